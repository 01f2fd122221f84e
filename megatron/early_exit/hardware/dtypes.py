"""Which number formats are fast on this machine.

A CPU computes with every format, but one that it lacks instructions for is emulated: products in
bf16 may take ten times as long as in fp32, or a fifth. So they are measured, in some milliseconds
once per process, on a product of many rows as in training and prompts and one of a single row as in
decoding. A GPU is asked instead.

The environment variable EARLY_EXIT_FAST_DTYPES says it in the place of the measurement: a list like
`fp32` or `fp32,bf16`. With it a machine behaves like one of the other kind, which tests and figures
of both kinds need."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

VARIABLE = "EARLY_EXIT_FAST_DTYPES"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Rows, inputs and outputs of the products: as in training and prompts, and as in decoding.
_PRODUCTS = ((64, 256, 256), (1, 512, 512))
_ROUNDS = 7
# Formats that save half of the memory may cost this much more time, which also covers noise.
_STILL_FAST = 1.5


@dataclass(frozen=True, slots=True)
class DtypeSpeed:
    """How a format compares with fp32 on one device.

    Attributes:
        dtype: the format.
        factor: time of its products over that of fp32 ones, the larger of training's and
            decoding's; None where it was not measured.
        is_fast: it is worth computing in.
        device: "CPU" or the name of the GPU's kind, for sentences.
    """

    dtype: torch.dtype
    factor: float | None
    is_fast: bool
    device: str = "CPU"

    @property
    def finding(self) -> str:
        """A clause that says how slow it is, for the notes of those who ask."""
        name = NAMES[self.dtype]
        if self.factor is None:
            said = f" ({VARIABLE}={os.environ[VARIABLE]})" if VARIABLE in os.environ else ""
            return f"{name} counts as slow on this {self.device}{said}"
        return (
            f"{name} products take {self.factor:.1f} times as long as fp32 ones on this "
            f"{self.device}"
        )


def dtype_speed(dtype: torch.dtype, device: torch.device | str = "cpu") -> DtypeSpeed:
    """How fast a format is on a device.

    Args:
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        device: a CPU or a GPU.

    Raises:
        ValueError: EARLY_EXIT_FAST_DTYPES has an unknown value.
    """
    kind = torch.device(device).type
    if dtype == torch.float32:
        return DtypeSpeed(dtype, 1.0, True)
    label = "CPU" if kind == "cpu" else "GPU"
    forced = forced_dtypes()
    if forced is not None:
        return DtypeSpeed(dtype, None, dtype in forced, label)
    if kind == "cpu":
        factor = _measured_factor(dtype)
        return DtypeSpeed(dtype, factor, factor <= _STILL_FAST)
    # Emulated where the compute capability is below 8; half precision is native on every GPU.
    fast = kind != "cuda" or dtype == torch.float16
    return DtypeSpeed(dtype, None, fast or _gpu_has_bf16(), label)


def _gpu_has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def forced_dtypes() -> frozenset[torch.dtype] | None:
    """What EARLY_EXIT_FAST_DTYPES lists; None where it is not set.

    Raises:
        ValueError: a name in it is unknown.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(
            f"{VARIABLE}={text}: {unknown[0]!r} is unknown, allowed: a list of "
            f"{', '.join(DTYPES)} with commas between them"
        )
    return frozenset(DTYPES[name] for name in names)


@functools.cache
def _measured_factor(dtype: torch.dtype) -> float:
    threads = torch.get_num_threads()
    # Several wait for each other, which on a busy machine takes longer than the products.
    torch.set_num_threads(1)
    try:
        return max(_factor(product, dtype) for product in _PRODUCTS)
    finally:
        torch.set_num_threads(threads)


def _factor(product: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Time of a product over that of the same one in fp32, on one core."""
    functions = [_multiply(product, one) for one in (torch.float32, dtype)]
    reference, own = fastest_times(functions, _ROUNDS)
    return own / reference


def _multiply(product: tuple[int, int, int], dtype: torch.dtype) -> Callable[[], object]:
    rows, inputs, outputs = product
    # Not random ones: the generator's state is others'.
    x = torch.full((rows, inputs), 0.5, dtype=dtype, device="cpu")
    weight = torch.full((outputs, inputs), 0.5, dtype=dtype, device="cpu")

    @torch.inference_mode()
    def multiply() -> object:
        return torch.nn.functional.linear(x, weight)

    return multiply


def fastest_times(
    functions: list[Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = perf_counter,
) -> list[float]:
    """Seconds of each function: the least of some rounds, in which they take turns.

    Whatever else the machine does only adds time, so the least is the function's own. A first round
    does not count: in it libraries make their code.
    """
    least = [float("inf")] * len(functions)
    for number in range(rounds + 1):
        for index, function in enumerate(functions):
            start = clock()
            function()
            taken = clock() - start
            if number:
                least[index] = min(least[index], taken)
    return least


def best_training_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bf16 where it is fast, else fp32.

    Args:
        device: by default the GPU if there is one, else the CPU.

    Raises:
        ValueError: EARLY_EXIT_FAST_DTYPES has an unknown value.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.bfloat16 if dtype_speed(torch.bfloat16, device).is_fast else torch.float32


@functools.cache
def say_once(line: str) -> None:
    """Warn in one line, if this process has not yet; without a configured log it is written to the
    standard error."""
    logging.getLogger("megatron.early_exit").warning("%s", line)
