"""What the module says in answer to orders, against its definition, whatever was ordered before."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from megatron.early_exit.inference.distributed.draft_orders import DraftOrder
from megatron.early_exit.inference.distributed.stage_drafts import StageDrafts
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.page_store import PageStore
from megatron.early_exit.inference.model.runner import SegmentRunner
from tests.helpers.mtp_models import assert_drafts, mtp_model
from tests.helpers.tiny_models import TinyModel

TEXT = [(7 * place * place + place) % 61 for place in range(30)]
DEPTHS = 3


@cache
def model() -> TinyModel:
    return mtp_model(DEPTHS, noise=0.3, exits=(1,), use_exit_block=True)


class Stage:
    """The last stage of a pipeline of one, as `PipelineStage` uses it."""

    def __init__(self) -> None:
        self.runner = SegmentRunner(model().segmented, num_slots=2, capacity=32)
        self.pages = PageStore(self.runner, PAGE_SIZE, keeps_for_blocks=True)
        self.drafts = StageDrafts(self.runner)

    @torch.inference_mode()
    def run(self, slot: int, key: int, tokens: list[int], start: int) -> None:
        """Take the tokens from `start` on through the model."""
        span = Span(slot, start, len(tokens))
        self.drafts.begin(slot, key)
        self.runner.truncate(slot, start, ahead=self.drafts.rewind(span))
        for segment in range(2):
            self.runner.run(segment, [span], tokens[start:])

    def depths(self, slot: int) -> list[int]:
        """Tokens that the rows of each depth have seen."""
        return self.runner.block_lengths(slot)[1:]

    @torch.inference_mode()
    def save(self, slot: int, count: int) -> None:
        """Store the first pages of a slot."""
        lengths = self.pages.block_lengths(slot)
        for page in range(count):
            end = (page + 1) * PAGE_SIZE
            blocks = [index for index, length in enumerate(lengths) if length >= end]
            self.pages.save(page, slot, page, 2, blocks)

    @torch.inference_mode()
    def load(self, slot: int, key: int, count: int) -> None:
        """Begin with the first pages in a slot."""
        self.drafts.begin(slot, key)
        self.runner.truncate(slot, 0)
        for page in range(count):
            self.pages.load(page, slot, page)

    def order(self, order: DraftOrder) -> list[int]:
        """What the module drafts."""
        assert self.drafts.accepted([order]) == [order]
        return [output.best_token for output in self.drafts.run([order])[0]]


def order_of(key: int, slot: int, tokens: list[int], start: int, most: int = DEPTHS) -> DraftOrder:
    return DraftOrder(key, slot, start, tuple(tokens[start:]), (), most)


def test_drafts_that_turn_out_wrong_are_forgotten():
    stage, key, tokens = Stage(), 4, list(TEXT[:6])
    stage.run(0, key, tokens, 0)
    known = 0
    for num_right in (0, 1, 3, 2, 0):
        tokens.append(TEXT[len(tokens) + 9])
        drafts = stage.order(order_of(key, 0, tokens, known))
        assert_drafts(model(), tokens, drafts)
        assert len(drafts) == DEPTHS
        known = len(tokens)
        # Verified in one pass with the last token.
        stage.run(0, key, [*tokens, *drafts], known - 1)
        assert stage.depths(0) == [known + depth for depth in range(DEPTHS)]
        tokens += drafts[:num_right]
    # Two tokens of somebody else, behind drafts of which none was right.
    for _ in range(2):
        tokens.append(TEXT[len(tokens) + 3])
        stage.run(0, key, tokens, len(tokens) - 1)
    assert stage.depths(0) == [known] * DEPTHS
    tokens.append(2)
    assert_drafts(model(), tokens, stage.order(order_of(key, 0, tokens, known)))


def test_drafts_one_after_another_are_those_at_once():
    stages = [Stage(), Stage()]
    for stage in stages:
        stage.run(1, 9, TEXT[:8], 0)
    tokens = [*TEXT[:8], 5]
    at_once = stages[0].order(order_of(9, 1, tokens, 0))
    drafts: list[int] = []
    for start in (0, len(tokens), len(tokens)):
        order = DraftOrder(9, 1, start, tuple(tokens[start:]), tuple(drafts), 1)
        drafts += stages[1].order(order)
    assert drafts == at_once
    assert stages[0].depths(1) == stages[1].depths(1)


def test_sequences_in_one_pass_with_different_numbers_of_drafts():
    stage = Stage()
    texts = [TEXT[:4], TEXT[7:20]]
    for slot, text in enumerate(texts):
        stage.run(slot, slot, text[:-1], 0)
    orders = [order_of(slot, slot, text, 0, 1 + slot) for slot, text in enumerate(texts)]
    found = stage.drafts.run(orders)
    assert [len(one) for one in found] == [1, 2]
    for text, outputs in zip(texts, found, strict=True):
        assert_drafts(model(), text, [output.best_token for output in outputs])


@pytest.mark.parametrize("leaves", [True, False])
def test_nobody_drafts_in_the_slot_of_another(leaves):
    stage = Stage()
    tokens = [*TEXT[:8], 5]
    stage.run(0, 1, tokens[:-1], 0)
    stage.order(order_of(1, 0, tokens, 0))
    if leaves:
        stage.drafts.leave(0)
    else:
        stage.run(0, 2, TEXT[3:9], 0)
        assert stage.depths(0) == [0] * DEPTHS
    assert stage.drafts.accepted([order_of(1, 0, [*tokens, 6], len(tokens))]) == []
    # The same request anew.
    stage.drafts.leave(0)
    stage.run(0, 1, tokens, 0)
    assert_drafts(model(), [*tokens, 6], stage.order(order_of(1, 0, [*tokens, 6], 0)))


@pytest.mark.parametrize("most", [1, DEPTHS])
def test_pages_of_a_text_that_not_all_depths_have_seen(most):
    """What one depth gives the next is not stored, so the next has to have its rows, too."""
    stage = Stage()
    text = TEXT[: PAGE_SIZE + 4]
    stage.run(0, 1, text[:-1], 0)
    stage.order(order_of(1, 0, text, 0, most))
    stage.save(0, 1)
    # Somebody else leaves other rows in the slot that the page comes to.
    other = [(token + 11) % 61 for token in text]
    stage.run(1, 2, other[:-1], 0)
    stage.order(order_of(2, 1, other, 0))
    stage.load(1, 3, 1)
    assert stage.depths(1) == (
        [0] * DEPTHS if most == 1 else [PAGE_SIZE - DEPTHS + 1 + depth for depth in range(DEPTHS)]
    )
    stage.run(1, 3, text[:-1], PAGE_SIZE)
    assert_drafts(model(), text, stage.order(order_of(3, 1, text, 0)))


def test_behind_what_is_not_finite_nothing_is_drafted():
    stage = Stage()
    stage.run(0, 1, TEXT[:5], 0)
    with torch.inference_mode():
        stage.runner.keep(1, [Span(0, 0, 5)], None, torch.full((5, 32), float("nan")))
    # The runner still has what it has run last.
    stage.run(1, 2, TEXT[:3], 0)
    (outputs,) = stage.drafts.run([order_of(1, 0, [*TEXT[:5], 3], 0)])
    assert [output.is_finite for output in outputs] == [False]
