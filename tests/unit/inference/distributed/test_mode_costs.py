"""What modes decide by is measured where compiled layers make a difference, and nowhere else."""

import pytest

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.distributed import mode_costs
from megatron.early_exit.inference.distributed.mode_costs import ModeCosts
from megatron.early_exit.inference.distributed.parallel_backend import SingleProcess
from megatron.early_exit.inference.early_exit_engine import EarlyExitEngine
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.draft_gain import SAME_READINGS
from tests.helpers.mtp_models import mtp_model
from tests.helpers.tiny_models import make_model

MODEL = make_model(exits=(1, 3), use_exit_norm=True)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the measurement, which finds that two rows take 1.5 times as long as one, and four
    3 times."""
    found = []

    def seconds(runner, row_counts):
        found.append(tuple(row_counts))
        return [1.0, 1.5, 3.0]

    monkeypatch.setattr(mode_costs, "pass_seconds", seconds)
    return found


def costs(capacity, tiny=MODEL, **options):
    model = SegmentedModel(tiny.architecture, tiny.early_exit, tiny.weights, **options)
    return ModeCosts.measured(SingleProcess(model), SegmentRunner(model, 1, capacity))


def test_compiled_layers_are_measured(calls):
    found = costs(9, compile_rows=True)
    assert calls == [(1, 2, 4)]
    # Of a pass, one row's own time is a sixteenth of that of reading.
    expected = (1.5 * 17 / 16 - 2 / 16, 3 * 17 / 16 - 4 / 16)
    assert found.readings == pytest.approx(expected, abs=1e-3)
    for drafts in found.drafts:
        assert 1 < drafts.readings.two < found.readings.two
        assert drafts.readings.two < drafts.readings.several < found.readings.several


def test_a_module_that_drafts_is_measured_too(calls, monkeypatch):
    monkeypatch.setattr(mode_costs, "module_seconds", lambda runner: 0.5)
    model = mtp_model(exits=(1, 3), use_exit_norm=True)
    found = costs(9, model, compile_rows=True).mtp
    layers = 4 * model.architecture.layer_weights
    assert found is not None
    # Half of the time of a row through all layers.
    a_row = 17 / 16
    half = (layers * a_row + found.step) / 2
    assert found.ask * a_row + found.step + found.waits.ask == pytest.approx(half)
    full = found.full * a_row + found.step
    assert found.of_question() == pytest.approx(half / full)
    plain = costs(9, model).mtp
    assert plain is not None
    assert plain.waits.ask == 0
    assert plain.of_question() < found.of_question()


def test_plain_layers_and_short_slots_are_not(calls):
    for found in (costs(9), costs(4, compile_rows=True)):
        assert found.readings == SAME_READINGS
        assert {drafts.readings for drafts in found.drafts} == {SAME_READINGS}
    assert calls == []


@pytest.mark.parametrize("drafter", [{"draft_exit_layer": 1}, {"draft_method": "mtp"}])
@pytest.mark.parametrize(("temperature", "counts"), [(0.0, True), (0.7, False)])
def test_a_sampled_text_does_not_depend_on_what_was_measured(
    monkeypatch, temperature, counts, drafter
):
    """What decides about drafts on two machines, one of which is slow where several rows are
    multiplied, and where the module is asked."""
    model = mtp_model(exits=(1, 3), use_exit_norm=True)
    params = SamplingParams(
        mode="self_speculative", temperature=temperature, max_tokens=4, **drafter
    )
    found = []
    for rows, module in (([1.0, 1.0, 1.0], 0.1), ([1.0, 1.5, 3.0], 0.9)):
        monkeypatch.setattr(mode_costs, "pass_seconds", lambda *_, rows=rows: rows)
        monkeypatch.setattr(mode_costs, "module_seconds", lambda _, module=module: module)
        measured = costs(9, model, compile_rows=True)
        with monkeypatch.context() as patch:
            patch.setattr(mode_costs.ModeCosts, "measured", lambda *_, own=measured: own)
            engine = EarlyExitEngine(model.segmented)
        request = engine.submit([1, 2], params)
        found.append(request.mode.choice.gain._costs)
        engine.cancel(request)
    assert (found[0] != found[1]) == counts
