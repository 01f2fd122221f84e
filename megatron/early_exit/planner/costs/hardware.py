"""Accelerators and the links between them: data sheets, and the shares of them that programs reach.

Sources of the sheets: NVIDIA A100 data sheet (us-nvidia-1758950-r4), H100 data sheet, H200 data
sheet, DGX B200 data sheet; dense bf16 rates, half of the figures with sparsity. NVLink is counted
in one direction: 600 GB/s in all on an A100, 900 GB/s on Hopper, 1800 GB/s on a B200. The network
is that of the makers' reference nodes: one 200 Gb/s InfiniBand port for each A100 (DGX A100), one
of 400 Gb/s for each of the others. FP8 rates are dense, too: 1,979 TFLOP/s on Hopper, 4,500 on a
B200; an A100 has none.

Shares are the same for all models and layouts:

- Large products: 0.80 of the peak on an A100 (250 of 312 TFLOP/s), and 0.70 on an H100 (700 of
  989), whose clock falls under the load. These two are chosen by the published runs that
  `benchmarks/planner_published.py` compares with; H200 and B200 are assumed to be as an H100, and
  products in FP8 to reach the same share of their peak.
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
        fp8_flops_per_s: dense FP8 peak; None if it has none.
        is_blackwell: it has the products of microscaled formats (MXFP8).
        nodes_per_leaf: nodes that reach each other at the whole rate of the network.
        oversubscription: by how much the network is slower between nodes further apart, because a
            leaf switch has so many times the bandwidth down to its nodes than up to others.
    """

    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    num_processors: int
    product_share: float
    per_node: int = 8
    fp8_flops_per_s: float | None = None
    is_blackwell: bool = False
    nodes_per_leaf: int = 1
    oversubscription: float = 1.0

    @property
    def per_leaf(self) -> int:
        """Accelerators that reach each other at the whole rate of the network."""
        return self.per_node * self.nodes_per_leaf

    def link_bytes_per_s(self, leaves_node: bool, leaves_leaf: bool) -> float:
        """To another accelerator, by what is between: nothing but the node, a leaf switch, more."""
        if not leaves_node:
            return self.node_bytes_per_s
        return self.network_bytes_per_s / (self.oversubscription if leaves_leaf else 1.0)

    def ring_bytes_per_s(self, partners: int, on_node: int, on_leaf: int) -> float:
        """From an accelerator of a ring to the next, where the ring goes from node to node.

        It leaves a leaf switch once, however many of the switch's nodes it goes through, so that
        these nodes have more of the bandwidth to others than if each sent there.

        Args:
            partners: of the ring.
            on_node: how many of them a node has.
            on_leaf: how many of them are below a leaf switch.
        """
        if on_node == partners:
            return self.node_bytes_per_s
        if on_leaf == partners:
            return self.network_bytes_per_s
        return self.network_bytes_per_s / max(1.0, self.oversubscription * on_node / on_leaf)


_H100 = Accelerator(
    flops_per_s=989e12,
    memory_bytes=80e9,
    memory_bytes_per_s=3.35e12,
    node_bytes_per_s=450e9,
    network_bytes_per_s=50e9,
    num_processors=132,
    product_share=0.70,
    fp8_flops_per_s=1979e12,
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
        fp8_flops_per_s=4500e12,
        is_blackwell=True,
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
