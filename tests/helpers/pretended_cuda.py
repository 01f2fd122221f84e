"""CPU tensors that say they are on `cuda:0`: what a model would do on a GPU, without one.

Results are those of the CPU. What is found out is which operations mix devices, how many kernels
are launched, and where the host waits for the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.model import rows_attention
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.cpu_recorder import CpuRecorder, recorded_steps
from tests.helpers.tiny_models import TinyModel

CUDA = torch.device("cuda", 0)
_READS = {"tolist", "item", "cpu", "numpy", "equal", "allclose", "is_nonzero"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains")
}
"""What brings numbers to the host."""
_SIZED_BY_NUMBERS = {"nonzero", "masked_select", "unique", "unique_consecutive", "argwhere"}
"""Whose results have a size that the host has to learn."""
_UPLOADS = {"tensor", "as_tensor", "new_tensor"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class CudaTensor(Tensor):
    """A tensor on the pretended device; everything else is done by `PretendedCuda`."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Pinned(Tensor):
    """A tensor in pinned memory of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendedCuda(TorchFunctionMode):
    """While it is entered, `cuda` is a device, whose tensors are `CudaTensor`s.

    Attributes:
        launches: kernels by their operation; views and allocations are none.
        waits: how often the host waits for the device, by operation and place in the package.

    Raises:
        RuntimeError: an operation mixes devices, with its place; see also `mixed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.mixed: list[str] = []

    def reset(self) -> None:
        """Count from 0 again."""
        self.launches.clear()
        self.waits.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        tensors = list(_tensors((args, kwargs)))
        own = [one for one in tensors if isinstance(one, CudaTensor)]
        if name == "__get__" and own:
            return self._attribute(func, own[0])
        if name == "pin_memory":
            return args[0].clone().as_subclass(_Pinned)
        if name in ("to", "cuda"):
            return self._move(func, name, args, kwargs)
        device = kwargs.pop("device", None)
        is_on_cuda = bool(own) if device is None else torch.device(device).type == "cuda"
        if device is not None and not is_on_cuda:
            kwargs["device"] = device
        if not is_on_cuda and not own:
            return func(*args, **kwargs)
        if name in _UPLOADS:
            self._wait(name)
        self._check(name, args, kwargs)
        result = func(*args, **kwargs)
        if name in _READS:
            self._wait(name)
            return result.clone().as_subclass(Tensor) if isinstance(result, Tensor) else result
        is_sized = name == "repeat_interleave" and "output_size" not in kwargs
        masks = _tensors(args[1:] if name in ("__getitem__", "__setitem__") else ())
        if (
            name in _SIZED_BY_NUMBERS
            or (is_sized and len(own) > 1)
            or any(one.dtype == torch.bool for one in masks)
        ):
            self._wait(name)
        if self._is_launched(name, result, own):
            self.launches[name] += 1
        return _on_cuda(result, args)

    def _attribute(self, func: Callable[..., Any], tensor: Tensor) -> Any:
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        known = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        return known[name] if name in known else _on_cuda(func(tensor), ())

    def _move(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Move a tensor between the host and the device that is pretended (`to`, `cuda`)."""
        tensor, *rest = args
        device = kwargs.pop("device", CUDA if name == "cuda" else None)
        for one in rest:
            if isinstance(one, str | torch.device):
                device = one
            elif isinstance(one, Tensor):
                device = CUDA if isinstance(one, CudaTensor) else "cpu"
                kwargs["dtype"] = one.dtype
            elif isinstance(one, torch.dtype):
                kwargs["dtype"] = one
        is_here = isinstance(tensor, CudaTensor)
        goes_here = is_here if device is None else torch.device(device).type == "cuda"
        waits = not (kwargs.pop("non_blocking", False) and isinstance(tensor, _Pinned))
        result = tensor.to(**kwargs) if kwargs else tensor
        if is_here != goes_here:
            self.launches["copy between devices"] += 1
            if waits or is_here:
                self._wait(name)
            result = result.clone()
            return result.as_subclass(CudaTensor if goes_here else Tensor)
        if is_here and result is not tensor:
            self.launches[name] += 1
        return _on_cuda(result, args) if is_here else result

    def _check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find CPU tensors among those of the device; single numbers are allowed there."""
        others = [
            one
            for one in _tensors((args, kwargs))
            if not isinstance(one, CudaTensor) and one.dim() > 0
        ]
        if not others:
            return
        is_indexed = name in ("__getitem__", "__setitem__") and isinstance(args[0], CudaTensor)
        if name == "copy_" or is_indexed:
            is_pinned = all(isinstance(one, _Pinned) for one in others)
            if not (is_pinned and kwargs.get("non_blocking")):
                self._wait(name)
        else:
            self.mixed.append(f"{name} at {_place()}")
            raise RuntimeError(f"tensors on different devices: {self.mixed[-1]}")

    def _is_launched(self, name: str, result: Any, own: list[CudaTensor]) -> bool:
        """Whether a kernel has run: results are new, or were changed in place."""
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            return name != "requires_grad_"
        results = list(_tensors(result))
        if not results or "empty" in name:
            return False
        known = {one.untyped_storage().data_ptr() for one in own}
        return any(one.untyped_storage().data_ptr() not in known for one in results)

    def _wait(self, name: str) -> None:
        self.waits[name, _place()] += 1


class PretendedRecorder:
    """Captures work on the pretended device; doing it again is one launch."""

    def __init__(self, mode: PretendedCuda) -> None:
        self._mode = mode
        self._recorder = CpuRecorder()

    @property
    def count(self) -> int:
        """How much has been captured."""
        return self._recorder.count

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run some work; returns what does it again as one launch, and its result."""
        run_again, result = self._recorder.record(work)

        def replay() -> None:
            launches, waits = self._mode.launches.copy(), self._mode.waits.copy()
            run_again()
            assert self._mode.waits == waits, "a graph cannot wait"
            self._mode.launches = launches
            self._mode.launches["replay"] += 1

        return replay, result


@contextmanager
def pretended_recorder(mode: PretendedCuda) -> Iterator[PretendedRecorder]:
    """Captures steps on the pretended device, where the kernels of a GPU are not there."""
    recorder = PretendedRecorder(mode)
    with (
        patch.object(rows_attention, "_kernel_for", lambda cache: rows_attention.plain),
        recorded_steps(recorder),
    ):
        yield recorder


def pretended_engine(
    model: TinyModel, is_captured: bool = False, **options: Any
) -> EarlyExitEngine:
    """An engine on the pretended device, which has to be entered; for captured layers, see
    `pretended_recorder`."""
    weights = {name: tensor.to("cuda") for name, tensor in model.weights.items()}
    segmented = SegmentedModel(model.architecture, model.early_exit, weights, None, is_captured)
    assert segmented.device == CUDA
    with patch("torch.cuda.mem_get_info", lambda device: (2**33, 2**33)):
        return EarlyExitEngine(segmented, **options)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for one in values:
            yield from _tensors(one)


def _on_cuda(values: Any, args: tuple[Any, ...]) -> Any:
    """Results as tensors on the device; those that are among the arguments stay the same."""
    if isinstance(values, CudaTensor) or any(values is one for one in args):
        return values
    if isinstance(values, Tensor):
        return values.as_subclass(CudaTensor)
    if isinstance(values, tuple) and hasattr(values, "_replace"):
        return type(values)(*(_on_cuda(one, args) for one in values))
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return type(values)(_on_cuda(one, args) for one in values)
    return values


def _place() -> str:
    """The file and line of the package from which torch has been called."""
    frame = sys._getframe(2)
    while frame is not None and "/early_exit/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "outside of the package"
    return f"{frame.f_code.co_filename.split('/early_exit/')[1]}:{frame.f_lineno}"
