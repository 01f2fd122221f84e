"""What the stages of a pipeline cost, in seconds and bytes: measured, or derived from hardware."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf

from megatron.early_exit.ranges import ZERO_OR_MORE, Range
from megatron.early_exit.schedules.actions import Kind


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage costs for one microbatch, with the exits and the embedding or head it has.

    Attributes:
        forward_s: seconds of a forward.
        backward_s: seconds of a whole backward, with what exits defer to it.
        weight_gradient_s: the part of backward_s that a zero-bubble schedule (arXiv
            2401.10241) can put off.
        local_backward_s: seconds of the exits' own forward and backward (EE-Tuning, arXiv
            2402.00518).
        static_bytes: weights, gradients and optimizer states.
        activation_bytes: kept from a forward to its backward.
        weight_gradient_bytes: the part of activation_bytes kept until the weight gradient.
        forward_extra_bytes: needed during a forward only.
        backward_extra_bytes: needed during a backward only, such as the logits of deferred exits.

    Raises:
        ValueError: a cost is negative, or a part larger than its whole.
    """

    forward_s: float
    backward_s: float
    weight_gradient_s: float = 0.0
    local_backward_s: float = 0.0
    static_bytes: float = 0.0
    activation_bytes: float = 0.0
    weight_gradient_bytes: float = 0.0
    forward_extra_bytes: float = 0.0
    backward_extra_bytes: float = 0.0

    def __post_init__(self) -> None:
        costs = [getattr(self, name) for name in _NAMES]
        parts_fit = self.weight_gradient_s <= self.backward_s
        parts_fit &= self.weight_gradient_bytes <= self.activation_bytes
        # Searches make very many of them.
        if not (parts_fit and min(costs) >= 0 and sum(costs) < inf):
            self._refuse()

    def _refuse(self) -> None:
        for name in _NAMES:
            ZERO_OR_MORE.check(**{name: getattr(self, name)})
        for part, whole in (
            ("weight_gradient_s", "backward_s"),
            ("weight_gradient_bytes", "activation_bytes"),
        ):
            most = Range(least=0, most=getattr(self, whole), most_means=whole)
            most.check(**{part: getattr(self, part)})

    @classmethod
    def combined(cls, parts: Sequence["StageCost"]) -> "StageCost":
        """What a stage made of parts costs, which run one after the other."""
        costs = {}
        for name in _NAMES:
            values = [getattr(part, name) for part in parts]
            costs[name] = max(values) if name in _ONE_AT_A_TIME else sum(values)
        return cls(**costs)

    @property
    def backward_forward_ratio(self) -> float:
        """Time of a backward over that of a forward."""
        return self.backward_s / self.forward_s

    def seconds(self, kind: Kind) -> float:
        """Seconds of a computation.

        Raises:
            ValueError: it is a message, not a computation.
        """
        match kind:
            case "F":
                return self.forward_s
            case "B":
                return self.backward_s
            case "I":
                return self.backward_s - self.weight_gradient_s
            case "W":
                return self.weight_gradient_s
            case "L":
                return self.local_backward_s
        raise ValueError(f"{kind} is not a computation, allowed: F, B, I, W, L")


_NAMES = tuple(field.name for field in fields(StageCost))
_ONE_AT_A_TIME = ("forward_extra_bytes", "backward_extra_bytes")


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a pipeline costs.

    Attributes:
        stages: of each stage.
        transfer_s: seconds to send a hidden state from each stage to the next, or its gradient
            back; one fewer than stages. Transfers keep neither rank from computing.

    Raises:
        ValueError: the numbers of stages and transfers do not fit.
    """

    stages: tuple[StageCost, ...]
    transfer_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.transfer_s) != len(self.stages) - 1:
            raise ValueError(
                f"{len(self.transfer_s)} transfers for {len(self.stages)} stages, allowed: one "
                "fewer than stages"
            )

    @property
    def backward_forward_ratio(self) -> float:
        """Time of a backward over that of a forward, of all stages together."""
        backward_s = sum(stage.backward_s for stage in self.stages)
        return backward_s / sum(stage.forward_s for stage in self.stages)

    @classmethod
    def even(
        cls,
        num_stages: int,
        forward_s: float,
        backward_s: float,
        weight_gradient_s: float = 0.0,
        transfer_s: float = 0.0,
    ) -> "CostModel":
        """Stages that all take the same time, and no memory."""
        stage = StageCost(
            forward_s=forward_s, backward_s=backward_s, weight_gradient_s=weight_gradient_s
        )
        return cls(stages=(stage,) * num_stages, transfer_s=(transfer_s,) * (num_stages - 1))
