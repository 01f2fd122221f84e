"""Accelerators and the links between them, from their data sheets.

Sources: NVIDIA A100 data sheet (us-nvidia-1758950-r4), H100 data sheet, H200 data sheet; dense
bf16 rates, half of the figures with sparsity. NVLink is counted in one direction: 600 GB/s in
all on an A100, 900 GB/s on Hopper. The network is that of the makers' reference nodes: one 200
Gb/s InfiniBand port for each A100 (DGX A100), one of 400 Gb/s for each H100 or H200 (DGX H100).
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
        per_node: accelerators of a node.
    """

    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    per_node: int = 8


_H100 = Accelerator(
    flops_per_s=989e12,
    memory_bytes=80e9,
    memory_bytes_per_s=3.35e12,
    node_bytes_per_s=450e9,
    network_bytes_per_s=50e9,
)
ACCELERATORS: dict[str, Accelerator] = {
    "a100-80gb": Accelerator(
        flops_per_s=312e12,
        memory_bytes=80e9,
        memory_bytes_per_s=2.039e12,
        node_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
    ),
    "h100": _H100,
    "h200": replace(_H100, memory_bytes=141e9, memory_bytes_per_s=4.8e12),
}
"""Accelerators by name."""
