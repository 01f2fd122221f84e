"""Work is never done twice, and never done in vain."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.kv_cache import KVCache
from megatron.early_exit.inference.modes import Choice, EarlyExitMode, Sampler
from megatron.early_exit.inference.sequence import Sequence
from tests.helpers.tiny_models import LLAMA, make_model

MODEL = make_model(exits=(1, 3), use_exit_norm=True)


class CountingSequence(Sequence):
    """Records the positions that each segment computes, pass by pass."""

    def __init__(self, *args):
        super().__init__(*args)
        self.passes = {index: [] for index in range(len(self.model.segments))}

    def run_segment(self, index):
        start = self.caches[index].length
        hidden = super().run_segment(index)
        self.passes[index].append(range(start, self.caches[index].length))
        return hidden


def decode(prompt, threshold, max_pending, num_tokens) -> tuple[CountingSequence, list[Choice]]:
    mode = EarlyExitMode(threshold, frozenset((1, 3)), max_pending)
    sampler = Sampler(SamplingParams(), torch.device("cpu"))
    sequence = CountingSequence(MODEL.segmented, len(prompt) + num_tokens)
    sequence.tokens = list(prompt)
    choices = []
    with torch.inference_mode():
        for _ in range(num_tokens):
            choices.append(mode.next_token(sequence, sampler))
            sequence.tokens.append(choices[-1].token_id)
    return sequence, choices


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(0, LLAMA.vocab_size - 1), min_size=1, max_size=8),
    threshold=st.floats(0, 1),
    max_pending=st.integers(1, 12),
    num_tokens=st.integers(1, 24),
)
def test_every_position_runs_once_and_only_if_needed(prompt, threshold, max_pending, num_tokens):
    sequence, choices = decode(prompt, threshold, max_pending, num_tokens)
    seen = len(prompt) + num_tokens - 1
    for index, passes in sequence.passes.items():
        ran = Counter(position for positions in passes for position in positions)
        assert set(ran.values()) <= {1}
        assert sorted(ran) == list(range(sequence.caches[index].length))
        longest = max((len(positions) for positions in passes), default=0)
        assert longest <= max(max_pending, len(prompt)) + 1
    assert sequence.caches[0].length == seen
    # The segments behind an exit have seen all up to the last token that did not leave before
    # them, or that was taken through by the cap.
    if max_pending > seen:
        for index, depth in ((1, 1), (2, 3)):
            deep = [i for i, choice in enumerate(choices) if choice.exit_layer > depth]
            expected = len(prompt) + deep[-1] if deep else 0
            assert sequence.caches[index].length == expected


def test_leaving_always_never_runs_the_deeper_segments():
    sequence, choices = decode([1, 2, 3], 0.0, 64, 10)
    assert [choice.exit_layer for choice in choices] == [1] * 10
    assert [len(passes) for passes in sequence.passes.values()] == [10, 0, 0]
    assert sequence.num_pending == 12


def test_the_cap_bounds_what_waits():
    sequence, choices = decode([1], 0.0, 4, 20)
    assert [choice.exit_layer for choice in choices] == [1] * 20
    assert [len(positions) for positions in sequence.passes[2]] == [5, 5, 5, 5]


def test_disabled_exits_are_not_computed(monkeypatch):
    asked = []
    exit_logits = Sequence.exit_logits

    def record(self, index):
        asked.append(index)
        return exit_logits(self, index)

    monkeypatch.setattr(Sequence, "exit_logits", record)
    engine = EarlyExitEngine(MODEL.segmented)
    params = SamplingParams(max_tokens=4, mode="early_exit", exit_layers=(3,))
    engine.generate([[1, 2]], params)
    assert asked == [1] * 4
    engine.generate([[1, 2]], SamplingParams(max_tokens=4))
    assert asked == [1] * 4


@settings(max_examples=30)
@given(ends=st.lists(st.integers(1, 5), min_size=1, max_size=6), groups=st.integers(1, 3))
def test_cache_windows_show_what_was_written(ends, groups):
    cache = KVCache(2, sum(ends), groups, 4, torch.float32, torch.device("cpu"))
    written = [torch.zeros(0, 2 * groups, 4) for _ in range(2)]
    for count in ends:
        windows = cache.extend(cache.length + count)
        for layer, (rows, keys, values) in enumerate(windows):
            new = torch.randn(count, 2 * groups, 4)
            rows.copy_(new)
            written[layer] = torch.cat((written[layer], new))
            assert torch.equal(keys[0], written[layer][:, :groups].transpose(0, 1))
            assert torch.equal(values[0], written[layer][:, groups:].transpose(0, 1))
    assert cache.length == sum(ends)


def test_a_segment_without_positions_in_front_is_an_error():
    sequence = Sequence(MODEL.segmented, 4)
    sequence.tokens = [1]
    sequence.run_segment(0)
    with pytest.raises(AssertionError, match="seen every position"):
        sequence.run_segment(0)
