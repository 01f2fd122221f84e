"""The tensors of a saved model, from all checkpoints that contain them."""

from megatron.early_exit.checkpoint.base import is_of_exit
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.lazy import LazyWeights
from megatron.early_exit.checkpoint.location import CheckpointLocation
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.weights import stored_weights
from megatron.early_exit.config import EarlyExitConfig


def model_weights(location: CheckpointLocation, description: ModelDescription) -> LazyWeights:
    """All tensors of a model; for an exits-only checkpoint, they include those of its base.

    Args:
        location: of the checkpoint.
        description: of the model in it, with an architecture.

    Raises:
        ValueError: a tensor is missing or has another shape, or the base is not there. Reading a
            tensor raises it if the base is not the model that the exits were tuned on.
    """
    architecture, early_exit = description.architecture, description.early_exit
    assert architecture is not None
    reader = CheckpointReader(location.iteration_dir)
    if description.base is None:
        return stored_weights(reader, architecture, early_exit)
    base = CheckpointReader(description.base.find(location.save_dir).iteration_dir)
    backbone = stored_weights(base, architecture, EarlyExitConfig())
    exits = stored_weights(reader, architecture, early_exit, is_of_exit)
    return {**description.base.checked(backbone), **exits}
