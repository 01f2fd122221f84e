"""The multi-token-prediction module on the last stage of a pipeline."""

from collections.abc import Iterable, Sequence

import torch

from megatron.early_exit.inference.distributed.draft_orders import DraftOrder
from megatron.early_exit.inference.engine.mtp_drafting import MtpDrafting
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.head_output import HeadOutput, head_outputs
from megatron.early_exit.inference.sequence import Sequence as Text


class StageDrafts:
    """Follows the driver's orders, and knows which tokens the rows of the module have seen.

    A sequence has rows in a slot from the first order about it on. Rows that have seen drafts stay
    for the pass that verifies those; what comes behind that pass says which of them were right.

    Args:
        runner: the last stage of a model with the module.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner
        self._module = MtpDrafting(runner)
        self._texts: dict[int, Text] = {}
        """By slot, what the orders have told."""

    def begin(self, slot: int, key: int) -> None:
        """Positions of a request come into a slot; they may be the first ones."""
        text = self._texts.get(slot)
        if text is None or text.key != key:
            self._texts[slot] = Text(key, [], slot=slot)
            self._runner.truncate(slot, 0)

    def leave(self, slot: int) -> None:
        """Whose slot it was has left it."""
        self._texts.pop(slot, None)

    def rewind(self, span: Span) -> int:
        """The position from which on tokens that rows have seen are not those of a pass, or not
        known to be, where it runs a span."""
        # The pass behind an order begins with the last token of that, and has its drafts.
        is_next = span.start == self._texts[span.slot].num_final - 1
        return span.end if is_next else span.start

    def accepted(self, orders: Iterable[DraftOrder]) -> list[DraftOrder]:
        """Those orders whose requests are still in their slots: nobody waits for the others."""
        return [
            order
            for order in orders
            if (text := self._texts.get(order.slot)) is not None and text.key == order.key
        ]

    @torch.inference_mode()
    def run(self, orders: Sequence[DraftOrder]) -> list[list[HeadOutput]]:
        """What the module says in answer to orders that are `accepted`, each about a sequence of
        its own."""
        found: dict[int, list[HeadOutput]] = {order.slot: [] for order in orders}
        for order in orders:
            text = self._texts[order.slot]
            text.prompt[order.start :] = order.tokens
            text.drafts = list(order.drafts)
            if not order.drafts:
                self._runner.truncate(order.slot, text.num_final - 1)
        for depth in range(1, len(self._runner.model.mtp) + 1):
            asking = [one for one in orders if _asks(one, depth, found[one.slot])]
            if asking:
                self._ask(depth, [self._texts[one.slot] for one in asking], found)
        return [found[order.slot] for order in orders]

    def _ask(self, depth: int, texts: list[Text], found: dict[int, list[HeadOutput]]) -> None:
        order, logits = self._module.logits(depth, texts)
        for place, output in zip(order, head_outputs(logits), strict=True):
            found[texts[place].slot].append(output)
            texts[place].drafts.append(output.best_token)


def _asks(order: DraftOrder, depth: int, outputs: Sequence[HeadOutput]) -> bool:
    """Whether a depth is asked in answer to an order, after those before it."""
    is_wanted = len(order.drafts) < depth <= len(order.drafts) + order.most
    return is_wanted and all(output.is_finite for output in outputs)
