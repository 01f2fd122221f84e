"""What accelerators exchange within a layer, and between stages; in seconds.

Sources: collectives of a layer, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198, section 4.2); rings of keys and values, "Ring Attention" (arXiv 2310.01889), as
Megatron's context parallelism runs them; parts of a message, arXiv 2104.04473, section 4.1.
"""

from dataclasses import dataclass

from megatron.early_exit.planner.costs.hardware import LATENCY_S, Accelerator, link_s
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import TrainingOptions

_BF16 = 2
# All-gathers and reduce-scatters of a layer's forward, or halves of its all-reduces.
_FORWARD_COLLECTIVES = 4
# Of six in the backward, Megatron runs those of the first of two products (the all-gather of its
# input, and the reduce-scatter of its gradient) beside the products of the other gradient.
_BACKWARD_COLLECTIVES = 2


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """Seconds of exchanges that nothing hides.

    Attributes:
        accelerator: that sends and receives.
        shape: of the model.
        layout: that divides it.
        options: of its training.
    """

    accelerator: Accelerator
    shape: ModelShape
    layout: Layout
    options: TrainingOptions

    def layer_s(self, attention_s: float) -> tuple[float, float]:
        """What the forward and the backward of a layer wait for.

        Args:
            attention_s: seconds in which the forward combines queries, keys and values.
        """
        collective_s = self._collective_s
        forward_s, backward_s = self._ring_s(attention_s)
        return (
            forward_s + _FORWARD_COLLECTIVES * collective_s,
            backward_s + _BACKWARD_COLLECTIVES * collective_s,
        )

    def message_s(self, stage: int) -> float:
        """Seconds from a stage to the next."""
        accelerator, layout = self.accelerator, self.layout
        leaves = layout.leaves_node(stage, accelerator.per_node)
        link = accelerator.network_bytes_per_s if leaves else accelerator.node_bytes_per_s
        sent_s = link_s(self._hidden_bytes / layout.tensor_parallel, link)
        # Without sequence parallelism each partner sends a part, and gathers the others' parts.
        return sent_s if self.options.sequence_parallel else sent_s + self._gather_s

    @property
    def _hidden_bytes(self) -> float:
        tokens = self.layout.microbatch_size * self.shape.seq_length
        return tokens / self.layout.context_parallel * _BF16 * self.shape.hidden_size

    @property
    def _gather_s(self) -> float:
        """Seconds of one all-gather, or reduce-scatter, among tensor-parallel partners."""
        partners = self.layout.tensor_parallel
        others = (partners - 1) / partners
        return link_s(others * self._hidden_bytes, self.accelerator.node_bytes_per_s)

    @property
    def _collective_s(self) -> float:
        """What is seen of one of them: where they run in pieces beside products, the first."""
        if self.options.tp_comm_overlap:
            return self._gather_s / self.layout.tensor_parallel
        return self._gather_s

    def _ring_s(self, attention_s: float) -> tuple[float, float]:
        """What attention waits for that sends its keys and values around among the accelerators
        that share a sequence; in backward with their gradients."""
        layout, shape = self.layout, self.shape
        partners = layout.context_parallel
        if partners == 1:
            return 0.0, 0.0
        on_node = layout.context_on_node(self.accelerator.per_node)
        near, far = self.accelerator.node_bytes_per_s, self.accelerator.network_bytes_per_s
        link = near if on_node == partners else far
        tokens = layout.microbatch_size * shape.seq_length / partners
        size = _BF16 * (shape.qkv_size - shape.query_size) / layout.tensor_parallel
        sent_s = link_s(tokens * size, link)
        step_s = attention_s / partners
        return (
            (partners - 1) * max(sent_s - step_s, LATENCY_S),
            (partners - 1) * max(2 * sent_s - 2.5 * step_s, LATENCY_S),
        )
