"""Self-speculative decoding: drafts of an exit, verified by the layers behind it in one pass.

What comes out is what the full model gives: greedily the same tokens, sampled the same
distribution (rejection sampling of Leviathan et al., arXiv 2211.17192; drafting with the model's
own first layers as in LayerSkip, arXiv 2404.16710). The verification is the catch-up of the drafted
positions through the deeper segments, so nothing is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from megatron.early_exit.inference.decoding.confidence import Assessment
from megatron.early_exit.inference.decoding.modes import Choice, Chooser, Next
from megatron.early_exit.inference.decoding.results import DraftCounts, HeadReport


@dataclass(slots=True)
class SelfSpeculativeMode:
    """Drafts at one exit, and verifies when there are enough of them or the exit grows unsure.

    Attributes:
        exit_index: the exit that drafts.
        max_drafts: most drafts before a verification.
        least_confidence: how likely a draft and all those in front of it have to be the full
            model's, by the exit's confidences; one that is less likely is not made, and ends the
            drafting. Where this is 0, how many there are at a time follows how many are accepted.
        room: most tokens that the sequence may get in all.
        counts: how it has gone so far.
        details: what the exit and the final head say in the place of each token is put on record.
    """

    asks_late: ClassVar[bool] = False
    chooser: Chooser
    exit_index: int
    max_drafts: int
    least_confidence: float
    room: int
    details: bool = False
    counts: DraftCounts = field(default_factory=DraftCounts)
    drafts: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    _likelihood: float = 1.0
    """That all drafts are accepted, by the exit's confidences."""
    _aim: int = 0
    _distributions: list[Tensor | None] = field(default_factory=list)
    _reports: list[HeadReport] = field(default_factory=list)
    """Of the exit, in the places of the drafts and behind them."""

    def __post_init__(self) -> None:
        self._aim = self.max_drafts

    def start(self, num_pending: int) -> None: ...

    def asks(self, exit_index: int) -> bool:
        return exit_index == self.exit_index

    def at_exit(self, exit_index: int, assessment: Assessment) -> Next:
        if self.details:
            self._reports.append(self.chooser.report(assessment, exit_index))
        left = self.room - len(self.chooser.generated)
        if len(self.drafts) >= min(self._aim, left - 1):
            return Next.DEEPER
        likelihood = self._likelihood * assessment.confidence
        if likelihood < self.least_confidence or not assessment.is_finite:
            return Next.DEEPER
        self._likelihood = likelihood
        chooser = self.chooser
        if chooser.sampler.is_greedy(len(chooser.generated) + len(self.drafts)):
            self.drafts.append(assessment.best_token)
            self._distributions.append(None)
        else:
            distribution = chooser.distribution(assessment, self.drafts)
            self.drafts.append(chooser.sampler.draw(distribution))
            self._distributions.append(distribution)
        return Next.DRAFTED

    def at_end(self, assessments: Sequence[Assessment]) -> Next:
        drafts, self.drafts = self.drafts, []
        self._likelihood = 1.0
        distributions, self._distributions = self._distributions, []
        reports, self._reports = self._reports, []
        self._choose(drafts, distributions, assessments)
        self.counts.verifications += 1
        self.counts.drafted += len(drafts)
        # Behind the accepted drafts there is one token of the final head.
        self.counts.accepted += len(self.choices) - 1
        if self.details:
            self.choices = [
                replace(choice, heads=(report, self.chooser.report(assessment, -1)))
                for choice, report, assessment in zip(
                    self.choices, reports, assessments, strict=False
                )
            ]
        return Next.CHOSEN

    def _choose(
        self,
        drafts: Sequence[int],
        distributions: Sequence[Tensor | None],
        assessments: Sequence[Assessment],
    ) -> None:
        """Take the drafts up to the first that is refused, and one token of the final head."""
        self.choices = []
        accepted: list[int] = []
        for draft, distribution, assessment in zip(
            drafts, distributions, assessments, strict=False
        ):
            token = self._verify(draft, distribution, assessment, accepted)
            layer = self.exit_index if token == draft else -1
            self.choices.append(self.chooser.take(assessment, layer, token))
            if token != draft:
                self._adapt(max(1, len(accepted) + 1))
                return
            accepted.append(token)
        # The last pass has given a token behind the drafts, too.
        self.choices.append(self.chooser.choose(assessments[len(drafts)], -1, accepted))
        self._adapt(len(drafts) + 1)

    def _adapt(self, aim: int) -> None:
        """Draft no more than so many the next time, where the exit does not say when to stop."""
        if not self.least_confidence:
            self._aim = min(self.max_drafts, aim)

    def _verify(
        self, draft: int, distribution: Tensor | None, assessment: Assessment, accepted: list[int]
    ) -> int:
        """The token that the full model gives in the place of a draft."""
        if distribution is None:
            return assessment.best_token
        sampler = self.chooser.sampler
        target = self.chooser.distribution(assessment, accepted)
        if sampler.uniform() * float(distribution[draft]) < float(target[draft]):
            return draft
        return sampler.draw(sampler.residual(target, distribution))
