"""What surrounds the choice of tokens: stops, limits, text, streams, seeds, faults."""

import dataclasses
import math

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.tiny_models import LLAMA, make_model

MODEL = make_model(exits=(1, 3), use_exit_norm=True)
PROMPT = [5, 17, 3]


class Letters:
    """A tokenizer of single letters: token 0 is the end of a document."""

    vocab_size = LLAMA.vocab_size
    eod_id = 0

    def encode(self, text):
        return [ord(letter) - 64 for letter in text]

    def decode(self, token_ids):
        return "".join(chr(64 + token) for token in token_ids if token)


def early_exit(**fields):
    return SamplingParams(mode="early_exit", early_exit_threshold=0.8, **fields)


def test_length_is_why_it_ends():
    result = EarlyExitEngine(MODEL.segmented).generate([PROMPT], SamplingParams(max_tokens=5))[0]
    assert result.finish_reason == "length"
    assert len(result.token_ids) == len(result.exit_layers) == len(result.logprobs) == 5
    assert result.prompt_token_ids == PROMPT
    assert result.text is None
    assert result.token_texts is None


def test_context_ends_a_sequence():
    prompt = [7] * (LLAMA.max_position_embeddings - 3)
    params = SamplingParams(max_tokens=100)
    result = EarlyExitEngine(MODEL.segmented).generate([prompt], params)[0]
    assert len(result.token_ids) == 3
    assert result.finish_reason == "length"


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=12), early_exit(max_tokens=12)])
def test_stops(params):
    free = EarlyExitEngine(MODEL.segmented).generate([PROMPT], params)[0].token_ids
    stop = free[6]
    expected = free[: free.index(stop) + 1]
    by_id = dataclasses.replace(params, stop_token_ids=(stop,))
    result = EarlyExitEngine(MODEL.segmented).generate([PROMPT], by_id)[0]
    assert (result.token_ids, result.finish_reason) == (expected, "stop")
    by_document = EarlyExitEngine(MODEL.segmented, eod_id=stop)
    assert by_document.generate([PROMPT], params)[0].token_ids == expected
    ignoring = dataclasses.replace(params, ignore_eos=True)
    assert by_document.generate([PROMPT], ignoring)[0].token_ids == free


def test_text_is_that_of_the_tokens():
    engine = EarlyExitEngine(MODEL.segmented, Letters())
    result = engine.generate("AB", early_exit(max_tokens=8, ignore_eos=True))[0]
    assert result.prompt_token_ids == [1, 2]
    assert result.text == Letters().decode(result.token_ids)
    assert "".join(result.token_texts) == result.text
    several = engine.generate(["AB", "C"], early_exit(max_tokens=8, ignore_eos=True))
    assert [r.prompt_token_ids for r in several] == [[1, 2], [3]]
    assert several[0].token_ids == result.token_ids


def test_the_stop_token_has_no_text():
    free = EarlyExitEngine(MODEL.segmented).generate([PROMPT], SamplingParams(max_tokens=4))[0]
    params = SamplingParams(max_tokens=4, stop_token_ids=(free.token_ids[2],))
    result = EarlyExitEngine(MODEL.segmented, Letters()).generate([PROMPT], params)[0]
    assert result.text == Letters().decode(result.token_ids[:-1])


def test_a_stream_gives_what_generate_gives():
    engine = EarlyExitEngine(MODEL.segmented, Letters())
    params = early_exit(max_tokens=9)
    result = engine.generate([PROMPT], params)[0]
    streamed = list(engine.stream(PROMPT, params))
    assert [token.token_id for token in streamed] == result.token_ids
    assert [token.text for token in streamed] == result.token_texts
    assert [token.exit_layer for token in streamed] == result.exit_layers
    assert [token.finish_reason for token in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert streamed[-1].finish_reason == result.finish_reason


def test_streams_do_not_disturb_each_other():
    engine = EarlyExitEngine(MODEL.segmented)
    params = early_exit(max_tokens=9)
    expected = [engine.generate([prompt], params)[0].token_ids for prompt in ([1, 2], [3])]
    pairs = zip(engine.stream([1, 2], params), engine.stream([3], params), strict=True)
    seen = [(left.token_id, right.token_id) for left, right in pairs]
    assert [list(tokens) for tokens in zip(*seen, strict=True)] == expected
    assert not torch.is_inference_mode_enabled()


def test_seeds_repeat():
    engine = EarlyExitEngine(MODEL.segmented)
    first, again, other = (
        engine.generate([PROMPT], early_exit(max_tokens=20, temperature=1.5, seed=seed))[0]
        for seed in (1, 1, 2)
    )
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.logprobs == again.logprobs
    assert all(
        math.exp(logprob) <= confidence * 1.0001
        for logprob, confidence in zip(first.logprobs, first.confidences, strict=True)
    )


def test_low_temperature_is_greedy():
    engine = EarlyExitEngine(MODEL.segmented)
    greedy = engine.generate([PROMPT], early_exit(max_tokens=20))[0]
    for cold in ({"temperature": 1e-4}, {"temperature": 5.0, "top_k": 1}):
        sampled = engine.generate([PROMPT], early_exit(max_tokens=20, seed=0, **cold))[0]
        assert sampled.token_ids == greedy.token_ids
        assert sampled.logprobs == pytest.approx(greedy.logprobs, abs=1e-6)


def test_damaged_weights_end_the_request():
    broken = make_model(exits=(1,))
    broken.weights["decoder.final_layernorm.weight"].fill_(math.nan)
    engine = EarlyExitEngine(broken.segmented)
    leaving_before = SamplingParams(mode="early_exit", early_exit_threshold=0.0)
    damaged, well = engine.generate([PROMPT, PROMPT], [SamplingParams(), leaving_before])
    assert (damaged.finish_reason, damaged.token_ids) == ("error", [])
    assert "not finite" in damaged.error
    assert (well.finish_reason, well.error) == ("length", None)
    assert engine.generate([PROMPT], leaving_before)[0].token_ids == well.token_ids
    with pytest.raises(FloatingPointError, match="not finite"):
        list(engine.stream(PROMPT))


def test_statistics_count_tokens_and_time():
    engine = EarlyExitEngine(MODEL.segmented)
    statistics = engine.generate([PROMPT], SamplingParams(max_tokens=5))[0].statistics
    assert (statistics.num_prompt_tokens, statistics.num_generated_tokens) == (3, 5)
    assert statistics.prefill_seconds > 0
    speed = 4 / statistics.decode_seconds
    assert statistics.decode_tokens_per_second == pytest.approx(speed)
    single = engine.generate([PROMPT], SamplingParams(max_tokens=1))[0].statistics
    assert single.decode_tokens_per_second == 0
