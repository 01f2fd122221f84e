"""What surrounds the choice of tokens: stops, limits, text, streams, seeds, faults."""

import dataclasses
import math

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine import scoring
from megatron.early_exit.inference.modes.mode import NO_TOKEN
from tests.helpers.reference_decoder import all_logits
from tests.helpers.tiny_models import LLAMA, make_model

MODEL = make_model(exits=(1, 3), use_exit_norm=True)
PROMPT = [5, 17, 3]


class Letters:
    """A tokenizer of single letters: token 0 is the end of a document."""

    vocab_size = LLAMA.vocab_size
    eod_id = 0
    other_end_ids = ()

    def encode(self, text):
        return [ord(letter) - 64 for letter in text]

    def decode(self, token_ids):
        return "".join(chr(64 + token) for token in token_ids if token)

    def token_bytes(self, token_id):
        return None if token_id else b""


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
    by_turn = EarlyExitEngine(MODEL.segmented, eod_id=0, other_end_ids=(stop, 1))
    (result,) = by_turn.generate([PROMPT], params)
    assert (result.token_ids, result.stop_reason) == (expected, stop)
    ignored = dataclasses.replace(params, ignore_eos=True)
    assert by_turn.generate([PROMPT], ignored)[0].token_ids == free
    forbidden = dataclasses.replace(params, min_tokens=len(expected))
    assert stop not in by_turn.generate([PROMPT], forbidden)[0].token_ids[: len(expected)]
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


def test_a_stop_string_ends_the_text_before_it():
    engine = EarlyExitEngine(MODEL.segmented, Letters())
    free = engine.generate("AB", SamplingParams(max_tokens=12, ignore_eos=True))[0]
    stop = free.text[4:6]
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop=(stop,))
    result = engine.generate("AB", params)[0]
    assert result.text == free.text[: free.text.index(stop)]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_echo_puts_the_prompt_in_front():
    engine = EarlyExitEngine(MODEL.segmented, Letters())
    plain = engine.generate("AB", SamplingParams(max_tokens=4))[0]
    echoed = engine.generate("AB", SamplingParams(max_tokens=4, echo=True))[0]
    assert echoed.text == "AB" + plain.text == "".join(echoed.token_texts)
    alone = engine.generate("AB", SamplingParams(max_tokens=0, echo=True))[0]
    assert (alone.text, alone.token_ids, alone.finish_reason) == ("AB", [], "length")


@pytest.mark.parametrize("chunk", [2, 256])
def test_scores_of_a_prompt_are_the_full_models(chunk, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    tokens = [5, 17, 3, 44, 8]
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    result = EarlyExitEngine(MODEL.segmented).generate([tokens], params)[0]
    expected = all_logits(MODEL, tokens)["final"].log_softmax(-1)
    assert [one.token_id for one in result.prompt_tokens] == tokens
    assert result.prompt_tokens[0].logprob is None
    for index, one in enumerate(result.prompt_tokens[1:]):
        assert one.logprob == pytest.approx(float(expected[index][one.token_id]), abs=1e-4)
        best = expected[index].topk(2)
        assert [token for token, _ in one.top_logprobs] == best.indices.tolist()
        assert [value for _, value in one.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


@pytest.mark.parametrize("mode", ["full", "early_exit", "self_speculative"])
def test_top_logprobs_hold_the_greedy_token(mode):
    params = SamplingParams(max_tokens=6, logprobs=3, mode=mode)
    result = EarlyExitEngine(MODEL.segmented).generate([PROMPT], params)[0]
    for token, logprob, top in zip(
        result.token_ids, result.logprobs, result.top_logprobs, strict=True
    ):
        assert top[0] == (token, pytest.approx(logprob, abs=1e-5))
        assert len(top) == 3


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("full", {}),
        ("early_exit", {}),
        ("self_speculative", {"draft_exit_layer": 1}),
        ("self_speculative", {"draft_exit_layer": 3, "num_draft_tokens": 3}),
        ("self_speculative", {"draft_exit_layer": 3, "draft_confidence": 0.6}),
        ("self_speculative", {"draft_exit_layer": 3, "temperature": 1.0, "seed": 1}),
    ],
)
def test_details_tell_of_the_heads_on_the_way(mode, fields):
    params = SamplingParams(max_tokens=12, mode=mode, exit_details=True, **fields)
    result = EarlyExitEngine(MODEL.segmented).generate([PROMPT], params)[0]
    tokens = list(PROMPT)
    for token, layer, heads in zip(result.token_ids, result.exit_layers, result.heads, strict=True):
        logits = all_logits(MODEL, tokens)
        expected_layers = [n for n in (1, 3, 4) if n <= layer]
        if mode == "self_speculative":
            expected_layers = [params.draft_exit_layer, 4]
        assert [head.layer for head in heads] == expected_layers
        for head in heads:
            expected = logits["final" if head.layer == 4 else head.layer][-1].softmax(-1)
            assert head.token_id == int(expected.argmax())
            assert head.confidence == pytest.approx(float(expected.max()), rel=1e-3)
        tokens.append(token)


def test_a_cancelled_request_keeps_what_it_has():
    engine = EarlyExitEngine(MODEL.segmented, max_batch_size=1)
    free = engine.generate([PROMPT], SamplingParams(max_tokens=20))[0]
    request = engine.submit(PROMPT, SamplingParams(max_tokens=20))
    waiting = engine.submit(PROMPT, SamplingParams(max_tokens=2))
    while len(request.tokens) < 3:
        engine.step()
    engine.cancel(request)
    result = request.result()
    assert (result.token_ids, result.finish_reason) == (free.token_ids[:3], "cancelled")
    while not waiting.is_finished:
        engine.step()
    assert waiting.result().token_ids == free.token_ids[:2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompts: a prompt is empty"),
        ([1, 2, 3], "prompts: 1 is not a prompt"),
        ([[1, 10_000]], "prompts: token 10000 is unknown"),
        ([[1] * 1000], "prompts: a prompt of 1000 tokens is too long"),
    ],
)
def test_prompts_out_of_range(prompts, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitEngine(MODEL.segmented).generate(prompts)


def test_a_head_that_gives_no_allowed_token_fails_its_request_only():
    model = make_model(exits=(1,), use_exit_norm=True, exit_vocab_size=10)
    engine = EarlyExitEngine(model.segmented)
    forbidding = SamplingParams(
        mode="early_exit",
        early_exit_threshold=0.0,
        temperature=1.0,
        min_tokens=2,
        stop_token_ids=tuple(range(10)),
    )
    failing, other = (
        engine.submit([1, 2], params) for params in (forbidding, SamplingParams(max_tokens=4))
    )
    while not (failing.is_finished and other.is_finished):
        engine.step()
    assert str(failing.exception) == NO_TOKEN
    assert (other.finish_reason, len(other.tokens)) == ("length", 4)
