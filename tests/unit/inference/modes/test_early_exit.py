"""Work is never done twice, and never done in vain."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.engine.policy import Costs
from megatron.early_exit.inference.engine.scheduler import Scheduler
from megatron.early_exit.inference.model.runner import SegmentRunner
from tests.helpers.tiny_models import LLAMA, make_model

MODEL = make_model(exits=(1, 3), use_exit_norm=True)
SEGMENTS = range(len(MODEL.segmented.segments))


class CountingRunner(SegmentRunner):
    """Records the positions that each segment computes, pass by pass, of the only sequence."""

    def __init__(self, *args):
        super().__init__(*args)
        self.passes = {index: [] for index in SEGMENTS}
        self.asked = []

    def run(self, index, spans, tokens=None, *, last):
        (span,) = spans
        for segment in range(index, last + 1):
            self.passes[segment].append(range(span.start, span.end))
        return super().run(index, spans, tokens, last=last)

    def exit_logits(self, index, spans):
        self.asked.append(index)
        return super().exit_logits(index, spans)


def decode(prompt, max_pending, params) -> tuple[CountingRunner, GenerationResult]:
    """Where questions cost nothing, so that no exit waits for others to be asked."""
    engine = EarlyExitEngine(MODEL.segmented, max_pending=max_pending, max_batch_size=1)
    runner = CountingRunner(MODEL.segmented, 1, engine.max_sequence_length)
    engine.loop.runner = runner
    engine.loop.scheduler = Scheduler(len(SEGMENTS), 1, costs=Costs((1.0,) * 3, step=0.0))
    (result,) = engine.generate([prompt], params)
    return runner, result


def early_exit(threshold, max_tokens, **fields):
    return SamplingParams(
        mode="early_exit", early_exit_threshold=threshold, max_tokens=max_tokens, **fields
    )


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(0, LLAMA.vocab_size - 1), min_size=1, max_size=8),
    threshold=st.floats(0, 1),
    max_pending=st.integers(1, 12),
    num_tokens=st.integers(1, 24),
)
def test_every_position_runs_once_and_only_if_needed(prompt, threshold, max_pending, num_tokens):
    runner, result = decode(prompt, max_pending, early_exit(threshold, num_tokens))
    seen = len(prompt) + num_tokens - 1
    for passes in runner.passes.values():
        ran = Counter(position for positions in passes for position in positions)
        assert set(ran.values()) <= {1}
        assert sorted(ran) == list(range(len(ran)))
        longest = max((len(positions) for positions in passes), default=0)
        assert longest <= max(max_pending, len(prompt)) + 1
    assert length(runner, 0) == seen
    # The segments behind an exit have seen all up to the last token that did not leave before
    # them, or that was taken through by the cap.
    if max_pending > seen:
        for index, depth in ((1, 1), (2, 3)):
            deep = [i for i, layer in enumerate(result.exit_layers) if layer > depth]
            assert length(runner, index) == (len(prompt) + deep[-1] if deep else 0)


def length(runner, index):
    """Positions that a segment has seen."""
    return sum(len(positions) for positions in runner.passes[index])


def test_leaving_always_never_runs_the_deeper_segments():
    runner, result = decode([1, 2, 3], 64, early_exit(0.0, 10))
    assert result.exit_layers == [1] * 10
    assert [len(passes) for passes in runner.passes.values()] == [10, 0, 0]


def test_the_cap_bounds_what_waits():
    runner, result = decode([1], 4, early_exit(0.0, 20))
    assert result.exit_layers == [1] * 20
    assert [len(positions) for positions in runner.passes[2]] == [5, 5, 5, 5]


def test_disabled_exits_are_not_computed():
    runner, _ = decode([1, 2], 64, early_exit(0.8, 4, exit_layers=(3,)))
    assert runner.asked == [1] * 4
    runner, _ = decode([1, 2], 64, SamplingParams(max_tokens=4))
    assert runner.asked == []


def test_verification_is_the_catch_up_of_the_drafts():
    params = SamplingParams(mode="self_speculative", num_draft_tokens=4, max_tokens=24)
    runner, result = decode([1, 2, 3], 64, params)
    assert len(result.token_ids) == 24
    # Each pass of the deeper segments takes all drafted positions and the one before them.
    assert [len(positions) for positions in runner.passes[2]] == [
        len(positions) for positions in runner.passes[1]
    ]
    assert max(len(positions) for positions in runner.passes[2][1:]) <= 5
    assert len(runner.passes[2]) < len(runner.passes[0])
