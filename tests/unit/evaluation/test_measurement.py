"""Records of a measurement, against the reference decoder on the same prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.measurement import Measurement
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import FULL
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.summary import summarize
from megatron.early_exit.evaluation.units import Unit, key_of
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.results import PromptToken
from tests.helpers import reference_decoder as reference
from tests.helpers.text_tokenizers import make_tokenizer
from tests.helpers.tiny_models import LLAMA, TinyModel, make_model

EXITS = (1, 3)
THRESHOLDS = (0.35,)
MAX_TOKENS = 6
ITEMS = (
    Item("short", "def main():", " return"),
    Item("short", "a list", " of spaces", stop=("e",)),
    Item("choosing", "print", choices=("(value)", ", don't", "日本"), gold=1),
)
SETTINGS = Settings(
    tasks=("short", "choosing"),
    thresholds=THRESHOLDS,
    measures=("max_probability", "margin"),
    max_tokens=MAX_TOKENS,
    repeats=1,
    batch_size=2,
)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    shape = replace(LLAMA, vocab_size=400)
    return make_model(shape, exits=EXITS, use_exit_norm=True)


@pytest.fixture(scope="module")
def engine(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> EarlyExitEngine:
    tokenizer = make_tokenizer("sentencepiece", tmp_path_factory.mktemp("tokenizer"))
    return EarlyExitEngine(model.segmented, tokenizer, prefix_caching=False)


@pytest.fixture(scope="module")
def records(engine: EarlyExitEngine) -> list[Record]:
    return measured(engine, SETTINGS)


def measured(engine: EarlyExitEngine, settings: Settings) -> list[Record]:
    measurement = Measurement(engine, ITEMS, settings)
    measurement.warm_up()
    found: list[Record] = []
    full: dict[int, Record] = {}
    for unit in measurement.units():
        found.append(measurement.measure(unit, full))
        if unit.kind == "answer" and unit.rule == FULL:
            full[unit.index] = found[-1]
    return found


def of_kind(records: list[Record], kind: str, of_rules: bool) -> list[Record]:
    return [r for r in records if r["kind"] == kind and (r["threshold"] is not None) == of_rules]


def test_every_prompt_has_a_record_for_every_rule(records):
    rules = len(SETTINGS.rules())
    assert rules == 2 * 2 * len(THRESHOLDS)
    assert len({key_of(one) for one in records}) == len(records)
    assert len(of_kind(records, "answer", False)) == 2
    assert len(of_kind(records, "answer", True)) == 2 * rules
    assert len(of_kind(records, "choice", False)) == 1
    assert len(of_kind(records, "choice", True)) == rules
    assert len(of_kind(records, "batch", True)) == rules


def test_answers_and_agreement_are_the_reference_decoders(model, engine, records):
    depths = set()
    for record in of_kind(records, "answer", True):
        prompt = engine.tokenizer.encode(ITEMS[record["index"]].prompt)
        wanted = reference.generate(
            model,
            prompt,
            MAX_TOKENS,
            record["threshold"],
            measure=record["measure"],
            propagates=record["kv_policy"] == "propagate",
        )
        tokens = [one.token_id for one in wanted]
        assert record["tokens"] == tokens
        assert record["exit_layers"] == [one.exit_layer for one in wanted]
        depths |= set(record["exit_layers"])
        full = reference.generate(model, prompt, MAX_TOKENS, None)
        assert record["same"] == [a == b.token_id for a, b in zip(tokens, full, strict=True)]
        judged = reference.choices(model, prompt, tokens, None)
        assert record["agrees"] == [a == b.token_id for a, b in zip(tokens, judged, strict=True)]
        scored = reference.scores(model, [*prompt, *tokens], None)[len(prompt) - 1 :]
        assert record["logprobs"] == pytest.approx([one.logprob for one in scored], abs=1e-4)
    assert depths == {*EXITS, LLAMA.num_layers}


def test_sets_of_exits_are_curves_of_their_own(model, engine):
    settings = replace(
        SETTINGS,
        thresholds=(0.25,),
        measures=("max_probability",),
        kv_policies=("exact",),
        exit_layers=(None, (3,)),
        batch_size=None,
    )
    records = measured(engine, settings)
    assert len({key_of(one) for one in records}) == len(records) == 3 * 3
    depths: dict[bool, set[int]] = {True: set(), False: set()}
    for record in of_kind(records, "answer", True):
        exits = record["exits_asked"]
        prompt = engine.tokenizer.encode(ITEMS[record["index"]].prompt)
        wanted = reference.generate(model, prompt, MAX_TOKENS, 0.25, exit_layers=exits)
        assert record["tokens"] == [one.token_id for one in wanted]
        assert record["exit_layers"] == [one.exit_layer for one in wanted]
        depths[exits is None] |= set(record["exit_layers"])
    assert 1 in depths[True]
    assert 3 in depths[False]
    assert 1 not in depths[False]
    for record in of_kind(records, "choice", True):
        tokens = engine.tokenizer.encode(ITEMS[2].prompt + ITEMS[2].choices[0])
        start = len(engine.tokenizer.encode(ITEMS[2].prompt)) - 1
        scored = reference.scores(model, tokens, 0.25, exit_layers=record["exits_asked"])[start:]
        total = sum(one.logprob for one in scored)
        assert record["choices"][0]["logprob"] == pytest.approx(total, rel=1e-4)
    found = summarize(records, [one.task for one in ITEMS], seed=0)
    assert {(one.curve, one.exit_layers) for one in found.outcomes} == {
        ("max_probability, exact", None),
        ("max_probability, exact, exits 3", (3,)),
    }


def test_the_full_models_own_text_is_followed_by_every_rule(model, records):
    full = {r["index"]: r for r in of_kind(records, "answer", False)}
    agreeing = []
    for record in of_kind(records, "answer", True):
        if record["kv_policy"] == "propagate":
            continue
        beside = full[record["index"]]
        wanted = reference.choices(
            model,
            beside["prompt_tokens"],
            beside["tokens"],
            record["threshold"],
            record["measure"],
        )
        pairs = zip(wanted, beside["tokens"], strict=True)
        assert record["forced_agrees"] == [one.token_id == token for one, token in pairs]
        agreeing += record["forced_agrees"]
    assert {*agreeing} == {True, False}


def test_exits_alone_have_the_confidences_and_choices_of_their_heads(model, records):
    for record in of_kind(records, "answer", False):
        text = [*record["prompt_tokens"], *record["tokens"]]
        heads = reference.all_heads(model, text)
        start = len(record["prompt_tokens"]) - 1
        positions = range(start, start + MAX_TOKENS)
        for measure, exits in record["exits"].items():
            for layer, found in exits.items():
                head = heads[int(layer)]
                wanted = [reference.confidence_of(head, at, measure) for at in positions]
                assert found["confidences"] == pytest.approx(wanted, abs=1e-5)
                assert found["agrees"] == [
                    int(head.logits[at].argmax()) == token
                    for at, token in zip(positions, record["choices"], strict=True)
                ]


@pytest.mark.parametrize("of_rules", [False, True])
def test_given_texts_have_the_reference_decoders_probabilities(model, engine, records, of_rules):
    for record in of_kind(records, "answer", of_rules):
        item = ITEMS[record["index"]]
        tokens = engine.tokenizer.encode(item.prompt + item.reference)
        rule = {
            "threshold": record["threshold"],
            "measure": record["measure"] or "max_probability",
            "propagates": record["kv_policy"] == "propagate",
        }
        wanted = sum(one.logprob for one in reference.scores(model, tokens, **rule))
        assert record["held_out"]["tokens"] == len(tokens) - 1
        assert record["held_out"]["logprob"] == pytest.approx(wanted, rel=1e-4)
        for layer, found in record.get("exits_held_out", {}).items():
            alone = reference.scores(model, tokens, 0.0, exit_layers=[int(layer)])
            assert found["logprob"] == pytest.approx(sum(o.logprob for o in alone), rel=1e-4)


def test_choices_have_the_probabilities_of_their_tokens(model, engine, records):
    item = ITEMS[2]
    for record in (*of_kind(records, "choice", False), *of_kind(records, "choice", True)):
        totals = []
        for choice, found in zip(item.choices, record["choices"], strict=True):
            tokens = engine.tokenizer.encode(item.prompt + choice)
            prompt = engine.tokenizer.encode(item.prompt)
            assert tokens[: len(prompt)] == prompt
            scored = reference.scores(
                model,
                tokens,
                record["threshold"],
                measure=record["measure"] or "max_probability",
                propagates=record["kv_policy"] == "propagate",
            )[len(prompt) - 1 :]
            totals.append(sum(one.logprob for one in scored))
            assert found["tokens"] == len(scored)
            assert found["logprob"] == pytest.approx(totals[-1], rel=1e-4)
        assert record["accuracy"] == (totals.index(max(totals)) == item.gold)


def test_figures_are_those_of_the_records(records):
    summary = summarize(records, [one.task for one in ITEMS], seed=0)
    full = of_kind(records, "answer", False)
    for outcome in summary.outcomes:
        if outcome.task != "all":
            continue
        own = [
            r
            for r in of_kind(records, "answer", True)
            if (r["measure"], r["kv_policy"]) == (outcome.measure, outcome.kv_policy)
            and r["threshold"] == outcome.threshold
        ]
        if outcome.threshold is None:
            assert outcome.point.agreement == outcome.point.speedup == 1
            own = full
        agrees = [a for r in own for a in r["agrees"]]
        assert outcome.point.agreement == pytest.approx(sum(agrees) / len(agrees))
        low, high = outcome.point.agreement_interval
        assert low <= outcome.point.agreement <= high
        held = [r["held_out"] for r in own]
        nats = -sum(h["logprob"] for h in held) / sum(h["tokens"] for h in held)
        assert outcome.held_out_perplexity == pytest.approx(math.exp(nats))
        assert sum(outcome.exit_shares.values()) == pytest.approx(1)
        assert outcome.scores["f1"].value == pytest.approx(sum(r["scores"]["f1"] for r in own) / 2)
        choice = of_kind(records, "choice", False)[0]
        assert outcome.scores["accuracy"].full == choice["accuracy"]
        assert outcome.batch.tokens_per_second > 0
    assert [(e.measure, e.layer) for e in summary.exits] == [
        (measure, layer) for measure in SETTINGS.measures for layer in EXITS
    ]
    for exit in summary.exits:
        agrees = [a for r in full for a in r["exits"][exit.measure][str(exit.layer)]["agrees"]]
        assert exit.agreement == pytest.approx(sum(agrees) / len(agrees))
        assert sum(one.count for one in exit.bins) == len(agrees)


def test_an_answer_ends_for_its_score_where_the_text_does(records):
    for record in records:
        if record["kind"] == "answer" and record["index"] == 1:
            assert "e" not in record["text"]
            assert len(record["tokens"]) == MAX_TOKENS


def test_whole_answers_are_timed_in_alternating_order(engine, monkeypatch):
    answers = []
    generate = engine.generate

    def spy(prompts, params):
        results = generate(prompts, params)
        if params.max_tokens == MAX_TOKENS:
            answers.append((params.mode, results[0].statistics))
        return results

    settings = replace(SETTINGS, repeats=3, thresholds=(0.0,))
    measurement = Measurement(engine, ITEMS[:2], settings)
    full = {index: measurement.measure(Unit("answer", index), {}) for index in (0, 1)}
    monkeypatch.setattr(engine, "generate", spy)
    for index, first in ((0, "full"), (1, "early_exit")):
        answers.clear()
        record = measurement.measure(Unit("answer", index, settings.rules()[0]), full)
        second = "early_exit" if first == "full" else "full"
        modes = [mode for mode, _ in answers]
        assert modes == [first, second, second, first, first, second]
        for name, wanted in (("seconds", "early_exit"), ("full_seconds", "full")):
            own = [one for mode, one in answers if mode == wanted]
            assert record[name] == [one.prefill_seconds + one.decode_seconds for one in own]


def test_choices_are_scored_from_one_place(engine, monkeypatch):
    texts = {"p": [1, 2, 3], "pa": [1, 2, 3, 4], "pb": [1, 2, 5, 6]}
    scored = [PromptToken(0, -1.0 * place, top_logprobs=()) for place in range(3)]
    monkeypatch.setattr("megatron.early_exit.evaluation.measurement.score", lambda *_: scored)
    item = Item("own", "p", choices=("a", "b"), gold=0)
    measurement = Measurement(engine, [item], SETTINGS)
    measurement._encode = texts.__getitem__
    record = measurement.measure(Unit("choice", 0), {})
    assert record["choices"] == [{"logprob": -3.0, "tokens": 2}] * 2


def test_an_exit_that_cannot_give_a_choice_chooses_none(engine, monkeypatch):
    def score(_engine, tokens, rule):
        impossible = rule != FULL and len(tokens) == 3
        return [PromptToken(0, -math.inf if impossible else -1.0, top_logprobs=())] * 2

    monkeypatch.setattr("megatron.early_exit.evaluation.measurement.score", score)
    items = [Item("own", "p", choices=choices, gold=0) for choices in (("a", "b"), ("bb", "b"))]
    measurement = Measurement(engine, items, replace(SETTINGS, batch_size=None))
    measurement._encode = lambda text: [1, 2] if text in ("p", "pb", "pbb") else [1, 2, 3]
    records = [measurement.measure(unit, {}) for unit in measurement.units()]
    early = of_kind(records, "choice", True)
    assert {(one["index"], one["accuracy"]) for one in early} == {(0, None), (1, True)}
    for outcome in summarize(records, ["own", "own"], seed=0).outcomes:
        found = outcome.scores["accuracy"]
        assert found.excluded == (outcome.threshold is not None)
        assert found.full == found.value == 1
    # Where no prompt is left, there is no accuracy.
    left = [one for one in records if one["index"] == 0]
    for outcome in summarize(left, ["own"], seed=0).outcomes:
        assert ("accuracy" in outcome.scores) == (outcome.threshold is None)


def test_the_last_batch_is_filled_with_the_first_prompts(engine):
    measurement = Measurement(engine, ITEMS[:1], replace(SETTINGS, batch_size=3))
    batches = [unit for unit in measurement.units() if unit.kind == "batch"]
    assert {unit.index for unit in batches} == {0}
    found = measurement.measure(Unit("batch", 0, batches[0].rule), {})
    assert found["members"] == [0, 0, 0]
    assert found["tokens"] == 3 * MAX_TOKENS


def test_what_cannot_be_measured_is_refused(model, engine):
    with pytest.raises(
        ValueError, match=r"prompt 0 \(task long\) has .* tokens, allowed: up to 58"
    ):
        Measurement(engine, [Item("long", "a list" * 40)], SETTINGS)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        Measurement(EarlyExitEngine(model.segmented), ITEMS, SETTINGS)
    settings = replace(SETTINGS, exit_layers=((1, 2),))
    with pytest.raises(ValueError, match=r"exit_layers: 1\+2 has one .*, allowed: 1\+3"):
        Measurement(engine, ITEMS, settings)
    with pytest.raises(ValueError, match=r"exit_layers \(3, 3\) has one twice"):
        replace(SETTINGS, exit_layers=((3, 3),))
    plain = make_model(replace(LLAMA, vocab_size=400))
    with pytest.raises(ValueError, match="the model has no exits"):
        Measurement(EarlyExitEngine(plain.segmented, engine.tokenizer), ITEMS, SETTINGS)
