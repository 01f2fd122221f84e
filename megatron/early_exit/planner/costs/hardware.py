"""Accelerators and the links between them: data sheets, and the shares of them that programs reach.

Sources of the sheets: NVIDIA A100 data sheet (us-nvidia-1758950-r4), H100 data sheet, H200 data
sheet, DGX B200 data sheet; dense bf16 rates, half of the figures with sparsity. NVLink is counted
in one direction: 600 GB/s in all on an A100, 900 GB/s on Hopper, 1800 GB/s on a B200. The network
is that of the makers' reference nodes: one 200 Gb/s InfiniBand port for each A100 (DGX A100), one
of 400 Gb/s for each of the others.

Shares are the same for all models and layouts:

- Large products: 0.80 of the peak on an A100 (250 of 312 TFLOP/s), and 0.70 on an H100 (700 of
  989), whose clock falls under the load. These two are chosen by the published runs that
  `benchmarks/planner_published.py` compares with; H200 and B200 are assumed to be as an H100.
- Memory is streamed at 0.85 of its bandwidth, and links carry 0.80 of their rate: 240 GB/s in the
  collectives of a DGX A100, 360 in those of a DGX H100.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator in a node of several.

    Attributes:
        flops_per_s: dense bf16 peak.
        memory_bytes: of its own memory.
        memory_bytes_per_s: bandwidth of that.
        node_bytes_per_s: to another accelerator of the node, in one direction.
        network_bytes_per_s: to one of another node, in one direction.
        num_processors: streaming multiprocessors, each of which computes one tile at a time.
        product_share: of the peak that large products reach.
        per_node: accelerators of a node.
    """

    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    num_processors: int
    product_share: float
    per_node: int = 8


_H100 = Accelerator(
    flops_per_s=989e12,
    memory_bytes=80e9,
    memory_bytes_per_s=3.35e12,
    node_bytes_per_s=450e9,
    network_bytes_per_s=50e9,
    num_processors=132,
    product_share=0.70,
)
ACCELERATORS: dict[str, Accelerator] = {
    "a100-80gb": Accelerator(
        flops_per_s=312e12,
        memory_bytes=80e9,
        memory_bytes_per_s=2.039e12,
        node_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        num_processors=108,
        product_share=0.80,
    ),
    "h100": _H100,
    "b200": Accelerator(
        flops_per_s=2250e12,
        memory_bytes=180e9,
        memory_bytes_per_s=7.7e12,
        node_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
        num_processors=148,
        product_share=0.70,
    ),
    "h200": replace(_H100, memory_bytes=141e9, memory_bytes_per_s=4.8e12),
}
"""Accelerators by name."""

MEMORY_SHARE = 0.85
"""Of a memory's bandwidth, when large tensors are read and written."""

LINK_SHARE = 0.80
"""Of a link's rate, when large messages are sent."""

LATENCY_S = 15e-6
"""Seconds until a message or a collective begins to move its bytes."""


def link_s(num_bytes: float, bytes_per_s: float) -> float:
    """Seconds to move bytes over a link of a data sheet's rate; nothing takes no time."""
    return LATENCY_S + num_bytes / (LINK_SHARE * bytes_per_s) if num_bytes else 0.0
