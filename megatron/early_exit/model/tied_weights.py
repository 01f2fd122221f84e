"""One output projection for all exits: equal copies of the word embedding on the stages.

A chunk that has tied exits, but neither the embedding nor an output layer tied to it, has its own
copy. So the gradient of the copy is complete when the chunk's backward passes are, on which the
overlapped reduction over data-parallel ranks relies. After Megatron has finalised the gradients,
those of all copies are all-reduced over one process group per pipeline. Megatron's own embedding
group is not changed: it handles one weight per rank, and only models that tie their final
projection.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class TiedWeights:
    """The tied weights of this rank.

    Attributes:
        group: ranks of this pipeline that have tied weights; the first one has the embedding.
        contributing: weights whose gradients are summed.
        receiving: weights that only receive the sum.
    """

    group: torch.distributed.ProcessGroup
    contributing: tuple[Parameter, ...]
    receiving: tuple[Parameter, ...]

    @property
    def all(self) -> tuple[Parameter, ...]:
        return self.contributing + self.receiving


def _local_weights(chunks: list[Any]) -> tuple[list[Parameter], list[Parameter]]:
    contributing = [c.exits.tied_copy for c in chunks if c.exits.tied_copy is not None]
    receiving = []
    for chunk in chunks:
        if chunk.pre_process:
            contributing.insert(0, chunk.embedding.word_embeddings.weight)
        elif chunk.post_process and chunk.share_embeddings_and_output_weights:
            # Megatron has already added its gradient to the embedding's.
            receiving.append(chunk.output_layer.weight)
    return contributing, receiving


def connect_tied_weights(chunks: list[MegatronModule]) -> list[MegatronModule]:
    """Copy the embedding's values to every copy, and record which ranks share them.

    This is a collective call over all ranks; it does nothing if no stage has a copy.
    """
    models: list[Any] = list(chunks)
    pipeline = models[0].pp_group
    ranks = tuple(torch.distributed.get_process_group_ranks(pipeline))
    contributing, receiving = _local_weights(models)
    has_copy = any(chunk.exits.tied_copy is not None for chunk in models)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    own = (ranks, has_copy, bool(contributing or receiving))
    torch.distributed.all_gather_object(everyone, own)
    mine = None
    for one in sorted({entry[0] for entry in everyone}):
        members = [rank for rank in one if everyone[rank][2]]
        if not any(everyone[rank][1] for rank in one):
            continue
        group = torch.distributed.new_group(members)
        if torch.distributed.get_rank() in members:
            assert isinstance(group, torch.distributed.ProcessGroup)
            mine = TiedWeights(group, tuple(contributing), tuple(receiving))
    for chunk in models:
        chunk.tied_weights = mine
    if mine is not None:
        _share_values(mine)
    return chunks


def _share_values(tied: TiedWeights) -> None:
    first = torch.distributed.get_process_group_ranks(tied.group)[0]
    for weight in tied.all:
        weight.shared_embedding = True  # type: ignore[attr-defined]
        weight.data = weight.data.cuda()
    values = tied.all[0].data.clone()
    torch.distributed.broadcast(values, src=first, group=tied.group)
    for weight in tied.all:
        weight.data.copy_(values)


def finalize_gradients(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Call Megatron's `finalize_model_grads`, then sum the gradients of the tied copies.

    It is used as `config.finalize_model_grads_func`.
    """
    finalize_model_grads(model, *args, **kwargs)
    tied: TiedWeights | None = getattr(unwrap_model(model[0]), "tied_weights", None)
    if tied is None:
        return
    total = torch.zeros_like(_gradient(tied.all[0]))
    for weight in tied.contributing:
        total += _gradient(weight)
    torch.distributed.all_reduce(total, group=tied.group)
    for weight in tied.all:
        _gradient(weight).copy_(total)


def _gradient(weight: Parameter) -> Tensor:
    gradient = getattr(weight, "main_grad", None)
    if gradient is None:
        gradient = weight.grad
    assert gradient is not None, "a tied weight has no gradient"
    return gradient
