"""How long the experts of a layer take on each accelerator, with their router, if tokens are spread
evenly over them.

Megatron's `alltoall` dispatcher: each token is copied for each of its experts, sent to the
accelerators that have these, sorted by expert, and back the same way. Copies are moved at the
bandwidth of the memory, one product of all experts that an accelerator has (`--moe-grouped-gemm`)
computes them. Sending is the business of `Exchanges`.
"""

from dataclasses import dataclass

from megatron.early_exit.planner.costs.experts import Experts
from megatron.early_exit.planner.costs.kernels import Kernels
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.part_time import (
    ACTIVATION_BYTES,
    PartTime,
    memory_time,
    product_time,
)
from megatron.early_exit.planner.costs.training_options import TrainingOptions

# Bytes of each entry of the copies that a permutation reads and writes.
_PERMUTED = 4
# Rows of a tile: the last tile of each expert's rows is half full on average.
_TILE_ROWS = 128
# For each expert and token: logits are written in bf16, copied to fp32, read by the softmax, which
# writes them; probabilities and choices are read and written. In backward as many.
_ROUTED = 2 + (2 + 4) + 8 + 8


@dataclass(frozen=True, kw_only=True)
class ExpertTimes:
    """Times of what is in a mixture of experts and in no MLP.

    Attributes:
        kernels: of the accelerator.
        shape: of the model.
        experts: of each of its layers.
        layout: that divides them.
        options: of its training.
    """

    kernels: Kernels
    shape: ModelShape
    experts: Experts
    layout: Layout
    options: TrainingOptions

    def time(self, tokens: float) -> PartTime:
        """The router, two permutations there and two back, and the experts.

        Args:
            tokens: that an accelerator has of those that its tensor-parallel partners share.
        """
        layout, experts = self.layout, self.experts
        copies = tokens * experts.moe_router_topk
        # Sorted by accelerator before they are sent, by expert where they arrive.
        permuted_entries = copies * self.shape.hidden_size
        if layout.expert_parallel * layout.expert_tensor_parallel > 1:
            permuted_entries *= 1 + layout.expert_tensor_parallel
        permuted = 2 * _PERMUTED
        return (
            self._router(tokens)
            + memory_time(self.kernels, permuted_entries, permuted, permuted)
            + self._products(copies * layout.expert_tensor_parallel)
        )

    def _router(self, tokens: float) -> PartTime:
        number = self.experts.num_experts
        product = product_time(self.kernels, tokens, self.shape.hidden_size, number)
        return product + memory_time(self.kernels, tokens * number, _ROUTED, _ROUTED)

    def _products(self, rows: float) -> PartTime:
        """Two products with an activation between them.

        Args:
            rows: copies of tokens that an accelerator gets for all of its experts.
        """
        shape, gated = self.shape, self.shape.gated_linear_unit
        width = self.experts.moe_ffn_hidden_size / self.layout.expert_tensor_parallel
        forward, backward = ACTIVATION_BYTES[gated]
        return (
            self._product(rows, shape.hidden_size, (1 + gated) * width)
            + memory_time(self.kernels, rows * width, forward, backward)
            + self._product(rows, width, shape.hidden_size)
        )

    def _product(self, rows: float, inputs: float, outputs: float) -> PartTime:
        number = self.experts.num_experts / self.layout.expert_parallel
        of_expert, padding = rows / number, _TILE_ROWS / 2
        return product_time(
            *(self.kernels, of_expert, inputs, outputs, self.options.fp8), number, padding
        )
