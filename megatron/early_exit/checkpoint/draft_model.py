"""An exit and the layers in front of it, as a model without exits.

Programs that know nothing of exits can run it as the draft model of speculative decoding: it is one
of their own models, with the vocabulary of the whole one.
"""

from dataclasses import replace

from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig

_MODULES = {
    "mlp": "decoder.layers.{last}.mlp",
    "block": "decoder.layers.{next}",
    "norm": "decoder.final_layernorm",
    "projection": "output_layer",
}
"""Where the parts of a head are in a model without exits."""


def draft_model(source: Conversion, position: int) -> Conversion:
    """The model that an exit gives its tokens by.

    Args:
        source: a model with exits.
        position: of the exit, the number of layers in front of it.

    Returns:
        A model of those layers, with the exit's MLP in place of the last one's and its block behind
        them, its norm as the final one, and the matrix that it projects with as output layer.

    Raises:
        ValueError: there is no such exit, or no model without exits computes what it does.
    """
    architecture, early_exit = source.description.architecture, source.description.early_exit
    assert architecture is not None
    if not early_exit.positions:
        raise ValueError(f"--draft-of-exit {position}: the model has no exits")
    if position not in early_exit.positions:
        has = ", ".join(map(str, early_exit.positions))
        problem = f"--draft-of-exit {position}: there is no exit after this layer"
        raise ValueError(f"{problem}, allowed: {has}")
    _refuse_inexpressible(early_exit)
    modules = {part.module for part in early_exit.head_parts if not part.is_beside}
    is_tied = architecture.share_embeddings_and_output_weights
    if not early_exit.share_final_head:
        is_tied = "projection" not in modules
    own = replace(
        architecture,
        num_layers=position + ("block" in modules),
        share_embeddings_and_output_weights=is_tied,
        mtp_num_layers=0,
        mtp_use_repeated_layer=False,
    )
    origins = {
        _MODULES[module].format(last=position - 1, next=position): f"exits.{position}.{module}"
        for module in modules
    }
    weights: dict[str, LazyTensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for name in weight_shapes(own, EarlyExitConfig()):
        origin = _origin(name, origins)
        weights[name], sources[name] = source.weights[origin], source.sources[origin]
    description = replace(
        source.description, architecture=own, early_exit=EarlyExitConfig(), base=None, rule=None
    )
    return Conversion(description, weights, sources)


def _origin(name: str, origins: dict[str, str]) -> str:
    """The tensor of the model with exits that becomes `name`."""
    for module, origin in origins.items():
        if name.startswith(f"{module}."):
            return origin + name[len(module) :]
    return name


def _refuse_inexpressible(early_exit: EarlyExitConfig) -> None:
    parts = [part for part in early_exit.head_parts if not part.is_beside]
    unknown = [part for part in parts if part.module not in _MODULES]
    problem = None
    if unknown:
        problem = "that no other model has"
    elif early_exit.exit_vocab_size is not None:
        problem = f"for {early_exit.exit_vocab_size} tokens only"
    elif not (early_exit.use_exit_norm or early_exit.share_final_head):
        problem = "without a norm, which every model has in front of its output layer"
    if problem is not None:
        raise ValueError(
            f"--draft-of-exit is not possible: the model's exits ({early_exit.head_flags}) have "
            f"heads {problem}"
        )
