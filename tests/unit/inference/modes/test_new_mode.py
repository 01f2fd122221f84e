"""The worked example of the docs: a decoding mode is one class and one line of the table."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Self

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.modes.early_exit import EarlyExitMode
from megatron.early_exit.inference.modes.mode import ModeContext
from megatron.early_exit.inference.modes.rule import ExitRule
from megatron.early_exit.inference.modes.table import MODES
from tests.helpers.reference_decoder import generate
from tests.helpers.tiny_models import make_model

NUM_FULL = 3


@dataclass(slots=True, kw_only=True)
class FullBeginning(EarlyExitMode):
    """Early exits, but for the first tokens of a text, on which the others stand."""

    usual: ExitRule

    @classmethod
    def of(cls, context: ModeContext) -> Self:
        rule = ExitRule(context.exits, context.thresholds)
        return cls(context.sampler, rule, max_pending=context.max_pending, usual=rule)

    def start(self, num_pending: int) -> None:
        EarlyExitMode.start(self, num_pending)
        is_late = len(self.sampler.sequence.generated) >= NUM_FULL
        self.rule = self.usual if is_late else replace(self.usual, thresholds=())


def test_what_it_takes():
    lines = len(inspect.getsource(FullBeginning).splitlines())
    # The table's line, the name among `Mode`'s, and the fields that have an effect in it alone.
    print(f"a new decoding mode: 3 files, {lines + 3} lines")
    assert lines + 3 <= 80


@pytest.mark.parametrize("max_batch_size", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_a_new_mode_is_one_class_and_a_line_of_the_table(monkeypatch, threshold, max_batch_size):
    monkeypatch.setitem(MODES, "early_exit", FullBeginning)
    model = make_model(exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented, max_batch_size=max_batch_size)
    params = SamplingParams(mode="early_exit", early_exit_threshold=threshold, max_tokens=9)
    prompts = [[1, 2, 3], [9], [40, 41, 42, 43], [7, 7]]
    for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
        beginning = generate(model, prompt, NUM_FULL, None)
        text = [*prompt, *(token.token_id for token in beginning)]
        expected = beginning + generate(model, text, 9 - NUM_FULL, threshold)
        assert result.token_ids == [token.token_id for token in expected]
        assert result.exit_layers == [token.exit_layer for token in expected]
