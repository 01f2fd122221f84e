"""How long one layer, and an output projection with its loss, take on each accelerator."""

from dataclasses import dataclass

from megatron.early_exit.planner.costs.expert_times import ExpertTimes
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

# Bytes moved for each entry of the hidden state. A norm reads and writes it; its backward reads two
# and writes one. A residual reads two and writes one, and its backward adds two gradients.
_NORM_FORWARD, _NORM_BACKWARD = 4, 6
_RESIDUAL_FORWARD, _RESIDUAL_BACKWARD = 6, 6
# Dropout beside a residual also writes its mask, and its backward is a pass of its own.
_DROPOUT_FORWARD, _DROPOUT_BACKWARD = 1, 5
# For each entry of queries and keys: rotated, or moved to where the attention wants it.
_POSITIONS = 4
# For each logit, in Megatron's cross entropy over a divided vocabulary: written in bf16, copied to
# fp32, read for the maximum, shifted, exponentiated, summed and divided in place; in backward the
# softmax is scaled in place and copied to bf16.
_LOGIT_FORWARD = 2 + (2 + 4) + 4 + 8 + 8 + 4 + 8
_LOGIT_BACKWARD = 8 + (4 + 2)


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Times of a layer's operations, for the tokens and the part of the weights that an accelerator
    has.

    Attributes:
        kernels: of the accelerator.
        shape: of the model.
        layout: that divides it.
        options: of its training.
    """

    kernels: Kernels
    shape: ModelShape
    layout: Layout
    options: TrainingOptions

    def layer(self, num_sequences: int) -> PartTime:
        """One layer, without recomputation."""
        shape, divided_by = self.shape, self.layout.tensor_parallel
        attention_forward_s, attention_backward_s = self.attention_s(num_sequences)
        query_size = shape.num_attention_heads * shape.kv_channels
        projections = self.linear(
            num_sequences, shape.hidden_size, shape.qkv_size / divided_by
        ) + self.linear(num_sequences, query_size / divided_by, shape.hidden_size)
        attention = PartTime(forward_s=attention_forward_s, backward_s=attention_backward_s)
        whole = projections + attention + self._around(num_sequences)
        if shape.shared_mlp_size:
            whole += self.mlp(num_sequences)
        if shape.experts is not None:
            experts = ExpertTimes(
                kernels=self.kernels,
                shape=shape,
                experts=shape.experts,
                layout=self.layout,
                options=self.options,
            )
            whole += experts.time(self._tokens(num_sequences) / divided_by)
        return whole

    def attention_s(self, num_sequences: int) -> tuple[float, float]:
        """Forward and backward of what combines queries, keys and values."""
        shape = self.shape
        heads = shape.num_attention_heads / self.layout.tensor_parallel
        tokens = self._tokens(num_sequences)
        flops = 4 * tokens * shape.seq_length * heads * shape.kv_channels
        if self.options.flash_attention:
            # Half of the matrix is masked.
            return self.kernels.flash_s(flops / 2)
        entries = tokens * shape.seq_length * heads
        return self.kernels.written_attention_s(flops, entries, self.options.has_dropout)

    def mlp(self, num_sequences: int) -> PartTime:
        """The products and the activation of one MLP, or of that beside the experts."""
        shape, tokens = self.shape, self._tokens(num_sequences)
        width = shape.shared_mlp_size / self.layout.tensor_parallel
        gated = shape.gated_linear_unit
        activation = self._memory(tokens * width, *ACTIVATION_BYTES[gated])
        first = self.linear(num_sequences, shape.hidden_size, (1 + gated) * width)
        return first + activation + self.linear(num_sequences, width, shape.hidden_size)

    def projection(self, num_sequences: int, vocab_size: int) -> PartTime:
        """An output projection with its norm and its loss."""
        columns = vocab_size / self.layout.tensor_parallel
        logits = self._tokens(num_sequences) * columns
        product = self.linear(num_sequences, self.shape.hidden_size, columns, in_fp8=False)
        norm = self._memory(self._outer_entries(num_sequences), _NORM_FORWARD, _NORM_BACKWARD)
        return product + norm + self._memory(logits, _LOGIT_FORWARD, _LOGIT_BACKWARD)

    def embedding(self, num_sequences: int) -> PartTime:
        """Reads a row for each token and writes it; in backward, the other way round."""
        return self._memory(self._outer_entries(num_sequences), 4, 4)

    def linear(
        self, num_sequences: int, inputs: float, outputs: float, in_fp8: bool = True
    ) -> PartTime:
        """A product with weights of inputs x outputs, and both of its gradients; in FP8 where
        training has it, or in bf16."""
        fp8 = self.options.fp8 if in_fp8 else None
        return product_time(self.kernels, self._tokens(num_sequences), inputs, outputs, fp8)

    def _around(self, num_sequences: int) -> PartTime:
        """Two norms, two residuals, and positions."""
        shape, dropout = self.shape, self.options.has_dropout
        outer = self._memory(
            2 * self._outer_entries(num_sequences),
            _NORM_FORWARD + _RESIDUAL_FORWARD + _DROPOUT_FORWARD * dropout,
            _NORM_BACKWARD + _RESIDUAL_BACKWARD + _DROPOUT_BACKWARD * dropout,
        )
        moved = self._tokens(num_sequences) * shape.qkv_size / self.layout.tensor_parallel
        return outer + self._memory(moved, _POSITIONS, _POSITIONS)

    def _tokens(self, num_sequences: int) -> float:
        return num_sequences * self.shape.seq_length / self.layout.context_parallel

    def _outer_entries(self, num_sequences: int) -> float:
        """Entries of the hidden state between products, that an accelerator has."""
        shared_by = self.layout.tensor_parallel if self.options.sequence_parallel else 1
        return self._tokens(num_sequences) * self.shape.hidden_size / shared_by

    def _memory(self, entries: float, forward: float, backward: float) -> PartTime:
        return memory_time(self.kernels, entries, forward, backward)
