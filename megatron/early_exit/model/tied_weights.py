"""One value for all copies of a parameter of the backbone that exits share.

Exits use the word embedding, or the output layer and the final norm. A chunk that has such exits,
but not the parameter itself, has its own copy (`backbone_parts`). So the gradient of the copy is
complete when the chunk's backward passes are, on which the overlapped reduction over data-parallel
ranks relies. After Megatron has finalised the gradients, those of all copies are all-reduced over
one process group per pipeline. Megatron's own embedding group is not changed: it handles one weight
per rank, and only models that tie their final projection.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from megatron.early_exit.model.backbone_parts import CAN_BE_COPIED, WORD_EMBEDDING


@dataclass(frozen=True)
class _Uses:
    """What a rank has of one parameter of the backbone.

    Attributes:
        has_original: the first of `contributing` is not a copy.
        has_copy: some of `contributing` are copies.
        contributing: parameters whose gradients are summed.
        receiving: parameters that only receive the sum.
    """

    has_original: bool
    has_copy: bool
    contributing: tuple[Parameter, ...]
    receiving: tuple[Parameter, ...]

    @property
    def all(self) -> tuple[Parameter, ...]:
        return self.contributing + self.receiving


@dataclass(frozen=True)
class TiedWeight:
    """A parameter of the backbone that several ranks of a pipeline hold, this rank among them.

    Attributes:
        group: the ranks.
        owner: the global rank of the one that has the original.
        uses: what this rank has of it.
    """

    group: torch.distributed.ProcessGroup
    owner: int
    uses: _Uses


def _local_uses(chunks: list[Any], name: str) -> _Uses:
    receiving = _megatrons_copies(chunks) if name == WORD_EMBEDDING else []
    found = [p for chunk in chunks if (p := _parameter(chunk, name)) is not None]
    original = [p for p in found if not any(p is one for one in receiving)]
    copies = [c.exits.backbone.copies[name] for c in chunks if name in c.exits.backbone.copies]
    return _Uses(bool(original), bool(copies), (*original, *copies), tuple(receiving))


def _megatrons_copies(chunks: list[Any]) -> list[Parameter]:
    """The copies of the word embedding whose gradients Megatron has already added to the
    original's."""
    later = [chunk for chunk in chunks if not chunk.pre_process]
    # Where more than one token is predicted, it has a whole embedding, and projects with that.
    found = [chunk.embedding.word_embeddings.weight for chunk in later if chunk.mtp_process]
    for chunk in later:
        is_tied = chunk.post_process and chunk.share_embeddings_and_output_weights
        if is_tied and not chunk.mtp_process:
            found.append(chunk.output_layer.weight)
    return found


def _parameter(chunk: Any, name: str) -> Parameter | None:
    try:
        found: Parameter = chunk.get_parameter(name)
    except AttributeError:
        return None
    return found


def connect_tied_weights(chunks: list[MegatronModule]) -> list[MegatronModule]:
    """Copy the values of the backbone's parameters to every copy, and record which ranks share
    them.

    This is a collective call over all ranks; it does nothing if no stage has a copy.
    """
    models: list[Any] = list(chunks)
    pipeline = models[0].pp_group
    ranks = tuple(torch.distributed.get_process_group_ranks(pipeline))
    own = {name: uses for name in CAN_BE_COPIED if (uses := _local_uses(models, name)).all}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    told = {name: (uses.has_original, uses.has_copy) for name, uses in own.items()}
    torch.distributed.all_gather_object(everyone, (ranks, told))
    groups: dict[tuple[int, ...], Any] = {}
    mine = []
    for one in sorted({entry[0] for entry in everyone}):
        for name in CAN_BE_COPIED:
            holders = {rank: uses for rank in one if (uses := everyone[rank][1].get(name))}
            if not any(has_copy for _, has_copy in holders.values()):
                continue
            members = tuple(holders)
            if members not in groups:
                groups[members] = torch.distributed.new_group(list(members))
            if torch.distributed.get_rank() in members:
                owner = next(rank for rank, (has_original, _) in holders.items() if has_original)
                mine.append(TiedWeight(groups[members], owner, own[name]))
    for chunk in models:
        chunk.tied_weights = tuple(mine)
    for tied in mine:
        _share_values(tied)
    return chunks


def _share_values(tied: TiedWeight) -> None:
    for weight in tied.uses.all:
        # Gives it a bucket of its own, which all ranks divide alike over data-parallel ranks.
        weight.shared_embedding = True  # type: ignore[attr-defined]
        weight.data = weight.data.cuda()
    values = tied.uses.all[0].data.clone()
    torch.distributed.broadcast(values, src=tied.owner, group=tied.group)
    for weight in tied.uses.all:
        weight.data.copy_(values)


def finalize_gradients(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Call Megatron's `finalize_model_grads`, then sum the gradients of the tied copies.

    It is used as `config.finalize_model_grads_func`.
    """
    finalize_model_grads(model, *args, **kwargs)
    every: tuple[TiedWeight, ...] = getattr(unwrap_model(model[0]), "tied_weights", ())
    for tied in every:
        total = torch.zeros_like(_gradient(tied.uses.all[0]))
        for weight in tied.uses.contributing:
            total += _gradient(weight)
        torch.distributed.all_reduce(total, group=tied.group)
        for weight in tied.uses.all:
            _gradient(weight).copy_(total)


def _gradient(weight: Parameter) -> Tensor:
    gradient = getattr(weight, "main_grad", None)
    if gradient is None:
        gradient = weight.grad
    assert gradient is not None, "a tied weight has no gradient"
    return gradient
