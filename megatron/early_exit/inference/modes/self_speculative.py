"""Self-speculative decoding: drafts of an exit, verified by the layers behind it in one pass.

What comes out is what the full model gives: greedily the same tokens, sampled the same
distribution (rejection sampling of Leviathan et al., arXiv 2211.17192; drafting with the model's
own first layers as in LayerSkip, arXiv 2404.16710). The verification is the catch-up of the drafted
positions through the deeper segments, so nothing is computed twice.
"""

from collections import abc
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.mode import (
    FINAL,
    DecodingMode,
    ModeContext,
    Next,
    Outcome,
    SampledToken,
)
from megatron.early_exit.inference.modes.rule import DraftRule, ExitRule
from megatron.early_exit.inference.results import DraftCounts


@dataclass(slots=True, kw_only=True)
class SelfSpeculativeMode(DecodingMode):
    """Drafts at the rule's only exit, and verifies when there are enough drafts or the exit grows
    unsure.

    Attributes:
        drafting: when the exit goes on drafting.
        room: the most tokens that the sequence may get in all.
        counts: how it has gone so far.
        details: what the exit and the final head say in the place of each token is put on record.
    """

    verifies: ClassVar[bool] = True
    drafting: DraftRule
    room: int
    counts: DraftCounts = field(default_factory=DraftCounts)
    _likelihood: float = 1.0
    """That all drafts are accepted, by the exit's confidences."""
    _aim: int = 0
    _distributions: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, context: ModeContext) -> Self:
        params, known = context.params, context.exit_layers
        layer = params.draft_exit_layer
        if layer is None:
            layer = known[0] if known else 0
        # Whether to go on drafting is not for the rule: it takes whatever the exit says.
        rule = ExitRule((context.exit_index("draft_exit_layer", layer),), threshold=0.0)
        drafting = DraftRule(params.num_draft_tokens, params.draft_confidence)
        return cls(context.sampler, rule, params.exit_details, drafting=drafting, room=context.room)

    def __post_init__(self) -> None:
        self._aim = self.drafting.max_drafts

    def start(self, num_pending: int) -> None:
        # What the exit has said in the places of the drafts is on record until they are verified.
        pass

    def at_exit(self, exit_index: int, output: HeadOutput, is_taken: bool) -> Outcome:
        self._record(output, exit_index)
        drafts = self.sampler.sequence.drafts
        left = self.room - len(self.sampler.sequence.generated)
        if len(drafts) >= min(self._aim, left - 1):
            return Next.DEEPER
        likelihood = self._likelihood * output.confidence
        if not (self.drafting.takes(likelihood) and output.is_finite):
            return Next.DEEPER
        self._likelihood = likelihood
        if self.sampler.is_greedy(drafts):
            draft, distribution = output.best_token, None
        else:
            distribution = self.sampler.distribution(output, drafts)
            draft = self.sampler.logits_sampler.draw(distribution)
        drafts.append(draft)
        self._distributions.append(distribution)
        return Next.DRAFTED

    def at_end(self, outputs: abc.Sequence[HeadOutput]) -> tuple[SampledToken, ...]:
        drafts, self.sampler.sequence.drafts = self.sampler.sequence.drafts, []
        self._likelihood = 1.0
        distributions, self._distributions = self._distributions, []
        reports, self._heads = self._heads, []
        tokens = self._verify(drafts, distributions, outputs)
        self.counts.verifications += 1
        self.counts.drafted += len(drafts)
        # Behind the accepted drafts there is one token of the final head.
        self.counts.accepted += len(tokens) - 1
        if self.details:
            tokens = [
                replace(token, heads=(report, self.sampler.report(output, FINAL)))
                for token, report, output in zip(tokens, reports, outputs, strict=False)
            ]
        return tuple(tokens)

    def _verify(
        self,
        drafts: abc.Sequence[int],
        distributions: abc.Sequence[Tensor | None],
        outputs: abc.Sequence[HeadOutput],
    ) -> list[SampledToken]:
        """The drafts up to the first that is refused, and one token of the final head."""
        (exit_index,) = self.rule.exits
        tokens: list[SampledToken] = []
        accepted: list[int] = []
        for draft, distribution, output in zip(drafts, distributions, outputs, strict=False):
            token = self._verified(draft, distribution, output, accepted)
            head = exit_index if token == draft else FINAL
            tokens.append(self.sampler.take(output, head, token))
            if token != draft:
                break
            accepted.append(token)
        else:
            # The last pass has given a token behind the drafts, too.
            tokens.append(self.sampler.sample(outputs[len(drafts)], FINAL, accepted))
        self._aim = self.drafting.next_aim(len(accepted) + 1)
        return tokens

    def _verified(
        self,
        draft: int,
        distribution: Tensor | None,
        output: HeadOutput,
        accepted: abc.Sequence[int],
    ) -> int:
        """The token that the full model gives in the place of a draft."""
        if distribution is None:
            return output.best_token
        sampler = self.sampler.logits_sampler
        target = self.sampler.distribution(output, accepted)
        if sampler.uniform() * float(distribution[draft]) < float(target[draft]):
            return draft
        return sampler.draw(sampler.residual(target, distribution))
