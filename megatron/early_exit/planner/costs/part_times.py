"""How long the parts of a model take: derived from the hardware's data sheet, or measured.

Times are those of a whole microbatch on one accelerator. What divides the parts over others, and
what that takes, is the business of `model_costs`.
"""

from dataclasses import dataclass, fields
from typing import Protocol

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.hardware import Accelerator
from megatron.early_exit.planner.costs.layer_profile import LayerProfile, Part
from megatron.early_exit.planner.costs.model_shape import ModelShape, part_weights
from megatron.early_exit.ranges import Range

# Bytes moved for each logit: forward writes bf16, reads it for the maximum, reads it and writes
# fp32 for the softmax; backward reads the softmax and writes a bf16 gradient.
_LOGIT_TRAFFIC_FORWARD = 2 + 2 + 2 + 4
_LOGIT_TRAFFIC_BACKWARD = 4 + 2

ACHIEVED_SHARE = Range(least=0, most=1, excludes_least=True)


@dataclass(frozen=True, kw_only=True)
class PartTime:
    """What one part of a model takes.

    Attributes:
        forward_s: seconds of a forward.
        backward_s: seconds of a backward.
        weight_gradient_s: the part of backward_s that a zero-bubble schedule can put off.
    """

    forward_s: float
    backward_s: float
    weight_gradient_s: float = 0.0

    def __add__(self, other: "PartTime") -> "PartTime":
        """Seconds of parts that run one after the other."""
        names = (field.name for field in fields(self))
        return PartTime(**{name: getattr(self, name) + getattr(other, name) for name in names})


class PartTimes(Protocol):
    """What the parts of one model take."""

    def time(self, part: Part, num_sequences: int) -> PartTime:
        """What one layer, the embedding, the final head or one exit takes; the loss of an exit may
        be anywhere in its forward and backward.

        Args:
            num_sequences: of a microbatch.
        """


@dataclass(frozen=True)
class HardwareTimes:
    """Times from the shape of a model and a data sheet.

    Attributes:
        shape: of the model.
        exits: of the model.
        accelerator: that it runs on.
        achieved_share: of the accelerator's peak, in matrix products. Measured on A100s for whole
            steps: 0.42 to 0.56 (arXiv 2205.05198, section 6).

    Raises:
        ValueError: achieved_share is not a share.
    """

    shape: ModelShape
    exits: EarlyExitConfig
    accelerator: Accelerator
    achieved_share: float = 0.5

    def __post_init__(self) -> None:
        ACHIEVED_SHARE.check(achieved_share=self.achieved_share)

    def time(self, part: Part, num_sequences: int) -> PartTime:
        """See `PartTimes`."""
        tokens = num_sequences * self.shape.seq_length
        match part:
            case "layer":
                return self._layer(tokens)
            case "embedding":
                return self._embedding(tokens)
            case "head":
                return self._projection(tokens, self.shape.vocab_size)
            case "exit":
                return self._exit(tokens)

    def _layer(self, tokens: int) -> PartTime:
        products_s = self._seconds(tokens, 2 * self.shape.layer_weights)
        whole_s = products_s + self._seconds(tokens, self.shape.attention_flops)
        # The gradients of inputs and of weights take a forward's operations each.
        return PartTime(forward_s=whole_s, backward_s=2 * whole_s, weight_gradient_s=products_s)

    def _embedding(self, tokens: int) -> PartTime:
        """Reads a row for each token and writes it; in backward, the other way round."""
        seconds = tokens * 4 * self.shape.hidden_size / self.accelerator.memory_bytes_per_s
        return PartTime(forward_s=seconds, backward_s=seconds)

    def _projection(self, tokens: int, vocab_size: int) -> PartTime:
        """An output projection and its loss; norms are left out."""
        products_s = self._seconds(tokens, 2 * vocab_size * self.shape.hidden_size)
        logits_per_byte_s = tokens * vocab_size / self.accelerator.memory_bytes_per_s
        return PartTime(
            forward_s=products_s + logits_per_byte_s * _LOGIT_TRAFFIC_FORWARD,
            backward_s=2 * products_s + logits_per_byte_s * _LOGIT_TRAFFIC_BACKWARD,
            weight_gradient_s=products_s,
        )

    def _exit(self, tokens: int) -> PartTime:
        whole = self._projection(tokens, self.exits.exit_vocab_size or self.shape.vocab_size)
        for part in self.exits.branch_parts:
            if part.tensors == "layer":
                whole += self._layer(tokens)
            else:
                seconds = self._seconds(tokens, 2 * part_weights(part, self.shape))
                whole += PartTime(forward_s=seconds, backward_s=2 * seconds)
        return whole

    def _seconds(self, tokens: int, flops_per_token: float) -> float:
        return tokens * flops_per_token / (self.accelerator.flops_per_s * self.achieved_share)


@dataclass(frozen=True)
class MeasuredTimes:
    """Times from a profile. Weights' gradients were not measured by themselves: they have the same
    part of a backward as in derived times.

    Attributes:
        profile: of layers of the same shape, and exits with the same heads.
        derived: times of the same model.
    """

    profile: LayerProfile
    derived: PartTimes

    def time(self, part: Part, num_sequences: int) -> PartTime:
        """See `PartTimes`."""
        derived = self.derived.time(part, num_sequences)
        backward_s = self.profile.seconds(part, "backward", num_sequences)
        return PartTime(
            forward_s=self.profile.seconds(part, "forward", num_sequences),
            backward_s=backward_s,
            weight_gradient_s=backward_s * (derived.weight_gradient_s / derived.backward_s),
        )
