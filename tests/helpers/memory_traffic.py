"""Counts the bytes of memory that operations read and write, without running on a GPU.

They are those of whole tensors that pass an operation; caches are not considered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of a large tensor these touch few elements.
_SPARSE = ("gather", "scatter_", "scatter_add_", "index")


class EagerTraffic(TorchDispatchMode):
    """Counts while it is active.

    Args:
        least: elements that a tensor has at least if it counts.

    Attributes:
        bytes: read and written.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least = least
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") not in _SPARSE:
            given = dict(zip((one.name for one in func._schema.arguments), args, strict=False))
            given |= kwargs or {}
            for argument in func._schema.arguments:
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                # A view is neither read nor written.
                is_read = argument.name != "out" and (argument.alias_info is None or is_written)
                self._add(given.get(argument.name), is_read + is_written)
            for value, returned in zip(tree_leaves(result), func._schema.returns, strict=False):
                self._add(value, returned.alias_info is None)
        return result

    def _add(self, value: object, times: int) -> None:
        if isinstance(value, Tensor) and value.numel() >= self._least:
            self.bytes += times * value.nbytes


def compiled_traffic(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Bytes that the kernels read and write that Inductor makes of a function, and their number.

    Nothing is generated or compiled: Inductor's plan is enough."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    counted: list[tuple[int, int]] = []

    def plan(module: Any, inputs: Any, **_: object) -> Any:
        graph = GraphLowering(module, example_inputs=inputs)
        with (
            V.set_graph_handler(graph),
            V.set_extern_kernel_nodes([]),
            V.set_debug_handler(DebugContext()),
        ):
            graph.run(*inputs)
            graph._update_scheduler()
            counted.append((graph.count_bytes()[0], len(graph.scheduler.nodes)))
        return make_boxed_func(module.forward)

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx(module, inputs, inner_compile=plan)

    # Without a GPU this package keeps functions eager.
    with torch.compiler.set_stance("default"), torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*args)
    (result,) = counted
    return result
