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
        # Those of the attention, and of an MLP if there is one: experts have others.
        share = (1 + bool(self.shape.shared_mlp_size)) / 2
        # Tokens are sent to their experts and back; so are their gradients.
        experts_s = 2 * (self._dispatch_s + self._expert_gather_s)
        return (
            forward_s + experts_s + share * _FORWARD_COLLECTIVES * collective_s,
            backward_s + experts_s + share * _BACKWARD_COLLECTIVES * collective_s,
        )

    def message_s(self, stage: int) -> float:
        """Seconds from a stage to the next."""
        accelerator, layout = self.accelerator, self.layout
        leaves_node = layout.leaves_node(stage, accelerator.per_node)
        link = accelerator.link_bytes_per_s(
            leaves_node, leaves_node and layout.leaves_node(stage, accelerator.per_leaf)
        )
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

    @property
    def _copied_bytes(self) -> float:
        """Of the copies of an accelerator's tokens for each of their experts."""
        experts = self.shape.experts
        copies = 0 if experts is None else experts.moe_router_topk
        return copies * self._hidden_bytes / self.layout.tensor_parallel

    @property
    def _dispatch_s(self) -> float:
        """Seconds of an all-to-all: each accelerator sends as much to each group of experts. What
        goes to other nodes and leaves does so at the same time as the rest."""
        accelerator, layout = self.accelerator, self.layout
        groups = layout.expert_parallel
        near, leaf = (
            layout.experts_on_node(number)
            for number in (accelerator.per_node, accelerator.per_leaf)
        )
        part = self._copied_bytes / groups
        return max(
            link_s((near - 1) * part, accelerator.node_bytes_per_s),
            link_s((groups - near) * part, accelerator.network_bytes_per_s),
            link_s((groups - leaf) * part, accelerator.link_bytes_per_s(True, True)),
        )

    @property
    def _expert_gather_s(self) -> float:
        """Seconds of an all-gather, or reduce-scatter, among accelerators that share experts."""
        layout, accelerator = self.layout, self.accelerator
        partners = layout.expert_tensor_parallel
        link = accelerator.ring_bytes_per_s(
            *(partners, min(partners, accelerator.per_node), min(partners, accelerator.per_leaf))
        )
        return link_s((partners - 1) * self._copied_bytes, link)

    def _ring_s(self, attention_s: float) -> tuple[float, float]:
        """What attention waits for that sends its keys and values around among the accelerators
        that share a sequence; in backward with their gradients."""
        layout, shape = self.layout, self.shape
        partners = layout.context_parallel
        if partners == 1:
            return 0.0, 0.0
        link = self.accelerator.ring_bytes_per_s(
            partners,
            layout.context_on_node(self.accelerator.per_node),
            layout.context_on_node(self.accelerator.per_leaf),
        )
        tokens = layout.microbatch_size * shape.seq_length / partners
        size = _BF16 * (shape.qkv_size - shape.query_size) / layout.tensor_parallel
        sent_s = link_s(tokens * size, link)
        step_s = attention_s / partners
        return (
            (partners - 1) * max(sent_s - step_s, LATENCY_S),
            (partners - 1) * max(2 * sent_s - 2.5 * step_s, LATENCY_S),
        )
