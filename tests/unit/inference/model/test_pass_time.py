"""The times of passes are measured on a model that is as good as new afterwards."""

import torch

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.mtp_rows import MtpRows
from megatron.early_exit.inference.model.pass_time import module_seconds, pass_seconds
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.mtp_models import mtp_model
from tests.helpers.tiny_models import make_model


def final_hidden(runner: SegmentRunner) -> torch.Tensor:
    """Behind all layers, of three tokens; as a later stage the runner is given what comes in."""
    spans = [Span(0, 0, 3)]
    runner.commit(spans, range(len(runner.model.segments)))
    for index in range(len(runner.model.segments)):
        if runner.model.begins_with_tokens or index:
            hidden = runner.run(index, spans, [1, 2, 3])
        else:
            hidden = runner.run(index, spans, hidden=torch.ones(3, 32))
    return hidden


def test_a_first_stage_and_a_later_one():
    model = make_model(exits=(1, 3), use_exit_norm=True)
    later = SegmentedModel(
        model.architecture, model.early_exit, model.weights, begins_with_tokens=False
    )
    for one in (model.segmented, later):
        size = one.architecture.hidden_size
        assert size == 32
        runner = SegmentRunner(one, 1, 9)
        seconds = pass_seconds(runner, (1, 4, 2))
        assert len(seconds) == 3
        assert min(seconds) > 0
        with torch.inference_mode():
            assert torch.equal(final_hidden(runner), final_hidden(SegmentRunner(one, 1, 9)))


def drafted(runner: SegmentRunner) -> torch.Tensor:
    """What both depths of a module say of the first of three tokens."""
    final_hidden(runner)
    rows = MtpRows(runner)
    assert rows.count(1, 0) == rows.count(2, 0) == 0
    first = rows.run(1, [Span(0, 0, 1)], [2], last_only=True)
    return torch.stack([first, rows.run(2, [Span(0, 0, 1)], [3], last_only=True)])


def test_the_module_that_drafts():
    model = mtp_model(exits=(1, 3), use_exit_norm=True).segmented
    runner = SegmentRunner(model, 1, 9)
    assert module_seconds(runner) > 0
    with torch.inference_mode():
        assert torch.equal(drafted(runner), drafted(SegmentRunner(model, 1, 9)))
