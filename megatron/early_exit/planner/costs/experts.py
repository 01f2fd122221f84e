"""Mixtures of experts on paper: the experts that a layer has in place of an MLP."""

from dataclasses import dataclass, fields

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.ranges import INDEX, ONE_OR_MORE, Range

# The router's logits and probabilities in fp32, and which tokens go to which expert.
_ROUTED_BYTES = 4 + 4 + 1
_RANGES = {
    "num_experts": Range(least=1, most=2**16, is_integer=True),
    "moe_shared_expert_intermediate_size": INDEX,
}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of each layer; Megatron's flags have these names. Tokens are spread evenly.

    Attributes:
        num_experts: of a layer.
        moe_router_topk: that each token is routed to.
        moe_ffn_hidden_size: width of an expert.
        moe_shared_expert_intermediate_size: width of the MLP that all tokens go through beside
            them; 0 for none.

    Raises:
        FieldError: a number is out of its range.
    """

    num_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            allowed = _RANGES.get(field.name, ONE_OR_MORE)
            allowed.check(**{field.name: getattr(self, field.name)})
        if self.moe_router_topk > self.num_experts:
            known = f"1 to --num-experts {self.num_experts}"
            raise out_of_range("moe_router_topk", self.moe_router_topk, known)

    def weights(self, hidden_size: int, matrices: int) -> int:
        """Weights of one expert with so many matrices: 3 if it is gated, or 2."""
        return matrices * hidden_size * self.moe_ffn_hidden_size

    def routed_bytes(self) -> int:
        """What the routing keeps of a token for the backward."""
        return _ROUTED_BYTES * self.num_experts
