"""Models with random weights on the device that is checked, and engines for them."""

import gc

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.model.segmented_model import SegmentedModel


def exits_at_quarter_and_half(architecture: Architecture) -> EarlyExitConfig:
    """Exits with a norm each, tied to the embedding; one where both places are the same."""
    layers = architecture.num_layers
    positions = {max(layers // 4, 1), max(layers // 2, 1)}
    return EarlyExitConfig(exit_layer_nums=tuple(sorted(positions)), use_exit_norm=True)


def random_weights(
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights that keep hidden states at the size that they begin with."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(architecture, early_exit).items():
        tensor = torch.ones(shape, device=device, dtype=dtype)
        if len(shape) > 1:
            tensor.normal_(std=shape[1] ** -0.5, generator=generator)
        weights[name] = tensor
    return weights


def make_engine(
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    weights: dict[str, Tensor],
    batch: int,
    length: int,
    compile_rows: bool = False,
    prefix_caching: bool = False,
) -> EarlyExitEngine:
    """An engine whose tokens that leave early wait in front of deeper layers as long as they can.

    Args:
        batch: sequences at a time.
        length: most positions of each.
    """
    model = SegmentedModel(architecture, early_exit, weights, compile_rows=compile_rows)
    return EarlyExitEngine(
        model,
        max_pending=length,
        max_batch_size=batch,
        max_sequence_length=length,
        prefix_caching=prefix_caching,
    )


def random_prompt(architecture: Architecture, length: int, seed: int = 1) -> list[int]:
    """A prompt of so many tokens, each as likely as the others."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(
        architecture.vocab_size, (length,), generator=generator
    ).tolist()
    return tokens


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
