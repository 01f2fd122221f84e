"""The compiler's code for an H100 that is not there.

    python -m tests.helpers.pretended_h100 ROWS ...

Two layers of a Llama of 8B are compiled for each of these numbers of rows, and each of their
kernels to machine code of an H100; a line of JSON for each number says what came of it. A process
of its own, since PyTorch's compiler believes from then on that there is one.
"""

import json
import math
import re
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import FakeTensorMode, fake_tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.model.compiled import LayerCompiler
from megatron.early_exit.inference.model.rotary import RotaryTable
from megatron.early_exit.inference.model.rows_attention import row_places
from tests.helpers.large_shapes import LLAMA_3_1_8B

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    uuid="",
)
TARGET = GPUTarget("cuda", 90, 32)
CUDA = torch.device("cuda", 0)
NUM_PLACES = 8193
"""Of each slot of a cache."""


class Driver:
    """What Triton asks the machine."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend() -> None:
    """From now on PyTorch's compiler believes that there is an H100."""
    torch._C._ensureCUDADeviceGuardSet()
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "_get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "is_initialized": False,
        "is_current_stream_capturing": False,
        "get_rng_state": state,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("_lazy_init", "synchronize", "set_device", "set_rng_state"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda *_: H100)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    triton.runtime.driver.set_active(Driver())
    # Which looks for the libraries of a driver.
    triton_helpers.set_driver_to_gpu = lambda: None
    # These run examples on the device.
    fuse_attention._sfdp_init = lambda *_, **__: None
    pad_mm._pad_mm_init = lambda *_, **__: None
    misc_patterns._misc_patterns_init = lambda *_, **__: None
    # In older releases, tensors without memory make a context on the device.
    fake_tensor.init_gpu_context = lambda *_: None
    config.shape_padding = config.joint_graph_constant_folding = False
    config.compile_threads = 1
    config.force_disable_caches = True


def machine_code(source: str) -> int:
    """Compile one of the compiler's kernels for an H100; returns the bytes of it."""
    (kernel,) = (
        one for one in vars(PyCodeCache.load(source)).values() if hasattr(one, "triton_meta")
    )
    signature = kernel.triton_meta["signature"]
    constants = {**kernel.configs[0].kwargs}
    pointers = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel.fn, signature=signature, constexprs=constants, attrs=pointers),
        target=TARGET,
        options={"num_warps": kernel.configs[0].num_warps},
    )
    return len(compiled.asm["cubin"])


def main() -> None:
    pretend()
    for num_rows in map(int, sys.argv[1:]):
        print(json.dumps(compiled_layers(num_rows)), flush=True)


def compiled_layers(num_rows: int) -> dict[str, Any]:
    """Compile two layers for a number of rows; returns what their code consists of."""
    kernels: dict[str, int] = {}
    codes: list[str] = []

    def triton_kernel(self: AsyncCompile, name: str, source: str, **_: Any) -> Any:
        kernels[name] = machine_code(source)
        return SimpleNamespace(run=lambda *_, **__: None)

    AsyncCompile.triton = triton_kernel
    GraphLowering.save_output_code = staticmethod(codes.append)
    shape, prefix = replace(LLAMA_3_1_8B, num_layers=1), "decoder.layers.0."
    sizes = {
        name.removeprefix(prefix): size
        for name, size in weight_shapes(shape, EarlyExitConfig()).items()
        if name.startswith(prefix)
    }
    with FakeTensorMode():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": CUDA}
        layers = [
            {name: torch.empty(size, **options) for name, size in sizes.items()} for _ in range(2)
        ]
        caches = [
            torch.empty(16, NUM_PLACES, 2 * shape.num_query_groups, shape.kv_channels, **options)
            for _ in range(2)
        ]
        hidden = torch.empty(num_rows, shape.hidden_size, **options)
        places = torch.empty(2, num_rows, dtype=torch.int64, device=CUDA)
        compiler = LayerCompiler(shape, RotaryTable(shape, CUDA), CUDA)
        # It is compiled; there is nothing to run it on.
        with suppress(RuntimeError):
            compiler.run(layers, caches, hidden, row_places(*places, NUM_PLACES))
    (code,) = codes
    call = code[code.index("def call(") :]
    shapes = re.findall(r"empty_strided_cuda\(\(([^)]*)\)", call)
    return {
        "kernels": len(re.findall(r"^ *triton_\w+\.run\(", call, re.M)),
        "products": len(re.findall(r"^ *extern_kernels\.\w+\(", call, re.M)),
        "attentions": len(re.findall(r"= torch\.ops\.early_exit\.attend_rows\.default\(", call)),
        "largest_buffer": max(_numel(shape, num_rows) for shape in shapes),
        "machine_code": kernels,
    }


def _numel(shape: str, num_rows: int) -> int:
    """Elements of a tensor with a shape such as "1 + s0, 4096"; its symbols are numbers of rows."""
    sizes = re.sub(r"s\d+", str(num_rows), shape).split(",")
    return math.prod(sum(map(int, size.split("+"))) for size in sizes if size.strip())


if __name__ == "__main__":
    main()
