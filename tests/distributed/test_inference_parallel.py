"""Engines over several processes: the oracle's tokens on every rank."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.distributed.parallel_backend import parallel_model
from megatron.early_exit.inference.distributed.process_groups import join, own_part
from megatron.early_exit.inference.engine import scoring
from megatron.early_exit.inference.modes import pauses
from megatron.early_exit.inference.modes.early_exit import EarlyExitMode
from megatron.early_exit.inference.modes.head_output import NOT_FINITE
from megatron.early_exit.inference.modes.mode import Next
from megatron.early_exit.inference.results import PromptToken
from tests.helpers.arrivals import (
    CONTEXT,
    Arrival,
    Syllables,
    assert_oracles,
    examples,
    play,
    rule_of,
)
from tests.helpers.compiler import has_cpp_compiler, needs_compiler
from tests.helpers.nccl_transfers import NcclTransfers
from tests.helpers.quantized_models import rounded_model
from tests.helpers.reference_decoder import ReferenceToken, generate, scores
from tests.helpers.reference_pauses import SHORT_PAUSES
from tests.helpers.spawn import spawn
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, TinyModel, make_model, save_checkpoint

MEASURED = [
    SamplingParams(mode="early_exit", max_tokens=6, prompt_logprobs=0, **fields)
    for fields in (
        {"exit_measure": "margin", "early_exit_threshold": 0.1},
        {"exit_measure": "entropy", "exit_thresholds": (0.6, 0.2)},
        {"exit_measure": "similarity", "exit_thresholds": (0.8, 0.6)},
        {"exit_measure": "similarity", "early_exit_threshold": 0.5, "exit_layers": (3,)},
        {"exit_measure": "similarity", "early_exit_threshold": 1.0},
        {"exit_thresholds": (0.9, 0.3), "exit_threshold_decay": 4.0},
        {"exit_measure": "gate", "early_exit_threshold": 0.5},
        {"exit_measure": "gate", "exit_thresholds": (0.7, 0.4), "exit_threshold_decay": 2.0},
        {"exit_measure": "gate", "early_exit_threshold": 0.6, "exit_details": True},
        {"exit_measure": "gate", "early_exit_threshold": 1.0},
        {"early_exit_threshold": 0.9, "exits_pay_at": 32},
        {"exit_measure": "similarity", "early_exit_threshold": 0.6, "exits_pay_at": 1},
        {"exit_measure": "gate", "early_exit_threshold": 0.6, "exits_pay_at": 32},
        {"early_exit_threshold": 0.9, "exits_pay_at": 32, "exit_details": True},
    )
]
"""Requests by other measures and thresholds than the usual ones."""
THRESHOLDS = (0.0, 0.3, 0.6, 0.9, 1.0)
# A norm alone is in "few answers", too.
MODELS = [("llama", head) for head in HEADS if head != "norm"] + [("gpt2", "all")]
LAYOUTS = {2: ((2, 1), (1, 2)), 4: ((1, 4), (2, 2))}
"""Number of processes -> tensor and pipeline parallel sizes."""
TRANSFERS: dict[str, dict[str, bool]] = {
    "blocking": {"blocking": True},
    "synchronizing": {"synchronizing": True},
}
ONE = ("llama", "all")
"""The model that more is asked of, in every layout."""
SHALLOW = ("shallow", "all")
COMPILED = {(2, 1): SHALLOW, (1, 2): ONE}
"""Two layers on each rank, in a stretch each or in one: the compiler takes seconds for each layer
of each stretch."""
SMALL_WEIGHTS = {(2, 1): ONE, (1, 2): ("gpt2", "all"), (2, 2): ("llama", "few answers")}
"""What is computed with weights in 8 bits: gated and not, untied and tied."""
SLOTS, NUM_ARRIVALS = (1, 3), 20
TEXT = [position * 7 % 61 for position in range(23)]
SAMPLED = SamplingParams(mode="early_exit", max_tokens=12, temperature=1.2, top_p=0.9, logprobs=2)


@cache
def model_of(kind: str, head: str) -> TinyModel:
    if kind == "shallow":
        return make_model(replace(LLAMA, num_layers=2), exits=(1,), **HEADS[head])
    gates = {"use_exit_gate": (kind, head) == ONE}
    return make_model({"llama": LLAMA, "gpt2": GPT2}[kind], exits=(1, 3), **HEADS[head], **gates)


def greedy_requests(
    seed: int, exits: tuple[int, ...] = (1, 3)
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Every mode and threshold, with prompts of many lengths."""
    choose = random.Random(seed)
    fields: list[dict[str, Any]] = [{"mode": "full"}]
    fields += [{"mode": "early_exit", "early_exit_threshold": t} for t in THRESHOLDS]
    fields += [{"mode": "early_exit", "early_exit_threshold": 0.3, "exit_layers": exits[-1:]}]
    fields += [{"mode": "self_speculative", "draft_exit_layer": layer} for layer in exits]
    held = {"mode": "early_exit", "kv_policy": "propagate"}
    fields += [{**held, "early_exit_threshold": t} for t in (0.0, 0.3, 0.6)]
    prompts = [[choose.randrange(61) for _ in range(choose.randint(1, 14))] for _ in fields]
    params = [SamplingParams(max_tokens=choose.randint(1, 8), **each) for each in fields]
    return prompts, params


def compiled_requests(model: tuple[str, str]) -> tuple[list[list[int]], list[SamplingParams]]:
    return greedy_requests(0, model_of(*model).early_exit.positions)


def divided_engine(
    folder: str, kind: str, head: str, layout: tuple[int, int], **options: Any
) -> EarlyExitEngine:
    """A few slots only, so that sequences follow each other in them."""
    tensor, pipeline = layout
    return EarlyExitEngine.from_checkpoint(
        Path(folder, f"{kind}-{head}"),
        device="cpu",
        max_batch_size=4,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        **options,
    )


def generate_everything(folder: str, arriving: list[list[Arrival]]) -> dict[Any, Any]:
    """All models in all layouts of this number of processes."""
    scoring.CHUNK = 9
    for name, value in SHORT_PAUSES.items():
        setattr(pauses, name, value)
    found: dict[Any, Any] = {}
    world_size = torch.distributed.get_world_size()
    for layout in LAYOUTS[world_size]:
        for number, (kind, head) in enumerate(MODELS):
            if layout == (2, 2) and head != "all":
                continue
            engine = divided_engine(folder, kind, head, layout)
            found[layout, kind, head] = engine.generate(*greedy_requests(number))
            found[layout, kind, head, "scored"] = scored_texts(engine)
            if (kind, head) == ONE:
                found[layout, "more"] = more_of_one(engine)
                found[layout, "measured"] = engine.generate([TEXT[:13]] * len(MEASURED), MEASURED)
            engine.close()
        if (small := SMALL_WEIGHTS.get(layout)) is not None:
            engine = divided_engine(folder, *small, layout, weight_dtype="int8")
            found[layout, "int8"] = engine.generate(*greedy_requests(0))
            engine.close()
        for name, fields in TRANSFERS.items() if layout[1] > 1 else ():
            found[layout, name] = with_transfers_of_nccl(folder, layout, **fields)
        if world_size == 2 and has_cpp_compiler():
            model = COMPILED[layout]
            engine = divided_engine(folder, *model, layout, compile=True)
            pairs = zip(*compiled_requests(model), strict=True)
            found[layout, "compiled"] = [engine.generate([prompt], one)[0] for prompt, one in pairs]
            engine.close()
    if world_size == 2:
        found["faults"] = faults(folder)
        found["disagreement"] = disagreement(folder)
        for num_slots in SLOTS:
            engine = pipeline_engine(model_of(*ONE), num_slots)
            found["arrivals", num_slots] = [play(engine, drawn) for drawn in arriving]
            engine.close()
    return found


def with_transfers_of_nccl(folder: str, layout: tuple[int, int], **fields: bool) -> dict[str, Any]:
    """What comes of transfers that stop their process, and which communicators they need."""
    with NcclTransfers(**fields).used() as transfers:
        engine = divided_engine(folder, *ONE, layout)
        communicators = list(transfers.communicators)
        pairs = zip(*greedy_requests(MODELS.index(ONE)), strict=True)
        results = []
        for prompt, params in pairs:
            results += engine.generate([prompt], params)
            # As a script may do that measures: nothing is on its way between two calls.
            transfers.synchronize()
            torch.distributed.barrier()
        results += engine.generate(*greedy_requests(MODELS.index(ONE)))
        scores = scored_texts(engine)
        engine.close()
    return {
        "results": results,
        "scores": scores,
        "communicators": communicators,
        "late": transfers.communicators[len(communicators) :],
    }


def pipeline_engine(model: TinyModel, num_slots: int) -> EarlyExitEngine:
    """With a tokenizer."""
    place, _ = join(1, 2, "cpu")
    parts = {
        name: own_part(place, model.architecture, model.early_exit, name, w)
        for name, w in model.weights.items()
    }
    own = {name: part for name, part in parts.items() if part is not None}
    segmented, backend = parallel_model(place, model.architecture, model.early_exit, own)
    sizes = {"max_batch_size": num_slots, "max_sequence_length": CONTEXT}
    return EarlyExitEngine(segmented, Syllables(), backend=backend, **sizes)


def more_of_one(engine: EarlyExitEngine) -> dict[str, Any]:
    """What is not in the tokens of `generate`."""
    stream = engine.stream([1, 2, 3], SAMPLED)
    abandoned = [next(stream), next(stream)]
    stream.close()
    details = [
        SamplingParams(mode="full", exit_details=True),
        SamplingParams(mode="early_exit", early_exit_threshold=0.6, exit_details=True),
        SamplingParams(mode="self_speculative", draft_exit_layer=3, exit_details=True),
    ]
    interrupted = engine.submit([4, 4], SamplingParams(max_tokens=5))
    engine.step()
    scores = [
        engine.generate([TEXT, [3]], SamplingParams(max_tokens=1, prompt_logprobs=2)),
        engine.generate([TEXT], SamplingParams(max_tokens=0, prompt_logprobs=0)),
    ]
    while not interrupted.is_finished:
        engine.step()
    idle = [engine.step() for _ in range(3)]
    return {
        "scores": [[result.prompt_tokens for result in results] for results in scores],
        "best": engine.argmax_tokens(TEXT),
        "idle": idle,
        "interrupted": interrupted.result().token_ids,
        "seeded": engine.generate([[5], [6, 7]], [SamplingParams(seed=3, temperature=1.0)] * 2),
        "unseeded": engine.generate([[5], [6, 7]], SAMPLED),
        "abandoned": [token.token_id for token in abandoned],
        "streamed": list(engine.stream([1, 2, 3], SamplingParams(max_tokens=5))),
        "details": engine.generate([[9, 8, 7]] * len(details), details),
        "after": engine.generate([[4, 4]], SamplingParams(max_tokens=5)),
    }


def scored_texts(engine: EarlyExitEngine) -> list[GenerationResult]:
    """By every rule."""
    early_exit = [
        SamplingParams(
            max_tokens=0,
            prompt_logprobs=2,
            mode="early_exit",
            early_exit_threshold=threshold,
            exit_layers=layers,
        )
        for threshold, layers in ((0.3, None), (0.6, None), (0.0, (3,)), (0.0, (1,)))
    ]
    held = [replace(one, kv_policy="propagate") for one in early_exit[:3]]
    params = [SamplingParams(max_tokens=0, prompt_logprobs=0), *early_exit, *held]
    return engine.generate([TEXT] * len(params), params)


def faults(folder: str) -> dict[str, Any]:
    """Refusals, and a request that fails among others."""
    told = {}
    for name, layout in (("heads", (2, 1)), ("processes", (4, 1))):
        with pytest.raises(ValueError, match="tensor_parallel") as refusal:
            divided_engine(folder, "single", "group", layout)
        told[name] = str(refusal.value)
    for name, layout in (("tensor", (2, 1)), ("pipeline", (1, 2))):
        engine = divided_engine(folder, "damaged", "end", layout)
        leaving = SamplingParams(mode="early_exit", early_exit_threshold=0.0)
        results = [engine.generate([[5, 6], [7]], [SamplingParams(), leaving]) for _ in range(3)]
        told[name] = [[(r.finish_reason, r.token_ids) for r in result] for result in results]
        for prompt, params in (
            ([], SamplingParams()),
            ([1] * 64, SamplingParams()),
            ([99], SamplingParams()),
            ([1], SamplingParams(mode="early_exit", exit_layers=(2,))),
        ):
            with pytest.raises(ValueError, match="allowed"):
                engine.generate([[1], prompt], [SamplingParams(), params])
        scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (result,) = engine.generate([[5, 6]], scored)
        told[f"{name}, scored"] = (result.error, result.prompt_tokens)
        with pytest.raises(FloatingPointError):
            engine.argmax_tokens([5, 6])
        engine.close()
    return told


def disagreement(folder: str) -> list[GenerationResult]:
    """A mode that does not take what its own rule takes."""
    engine = divided_engine(folder, *ONE, (1, 2))
    leaving = SamplingParams(mode="early_exit", early_exit_threshold=0.0, max_tokens=3)
    requests = [engine.submit([5], leaving), engine.submit([6], SamplingParams(max_tokens=3))]
    with patch.object(EarlyExitMode, "at_exit", lambda *args, **kwargs: Next.DEEPER):
        while not all(request.is_finished for request in requests):
            engine.step()
    engine.close()
    return [request.result() for request in requests]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models")
    models = {f"{kind}-{head}": model_of(kind, head) for kind, head in (*MODELS, SHALLOW)}
    models["damaged-end"] = make_model(exits=(1,))
    models["damaged-end"].weights["decoder.layers.3.mlp.linear_fc2.weight"].fill_(math.nan)
    models["single-group"] = make_model(replace(LLAMA, num_query_groups=1))
    for name, model in models.items():
        save_checkpoint(model, path / name)
        description = ModelDescription(model.architecture, model.early_exit, None)
        write_description(path / name, description)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def short_pauses() -> Iterator[None]:
    """For the oracle what the engines have, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT_PAUSES.items():
            patch.setattr(pauses, name, value)
        yield


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def found(request, folder) -> list[dict[Any, Any]]:
    """What every rank has got."""
    return spawn(generate_everything, request.param, folder, examples(NUM_ARRIVALS))


def oracles_tokens(
    model: TinyModel, prompt: list[int], params: SamplingParams
) -> list[ReferenceToken]:
    return generate(
        model,
        prompt,
        params.max_tokens,
        params.threshold if params.mode == "early_exit" else None,
        params.exit_layers,
        propagates=params.kv_policy == "propagate",
    )


def test_every_rank_gets_the_oracles_tokens(found):
    for number, (kind, head) in enumerate(MODELS):
        layouts = [key[0] for key in found[0] if key[1:] == (kind, head)]
        assert layouts
        for prompt, params, index in zip(*greedy_requests(number), itertools.count(), strict=False):
            expected = oracles_tokens(model_of(kind, head), prompt, params)
            for layout, results in itertools.product(layouts, found):
                result = results[layout, kind, head][index]
                where = (layout, kind, head, params)
                assert result.token_ids == [token.token_id for token in expected], where
                if params.mode != "self_speculative":
                    assert result.exit_layers == [token.exit_layer for token in expected], where
                assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=3e-4)
                assert result.finish_reason == "length"


def test_weights_in_8_bits_are_those_of_the_whole_matrices(found):
    """Whichever part of a matrix a rank has, its scales are those of whole channels."""
    for layout in LAYOUTS[len(found)]:
        if layout not in SMALL_WEIGHTS:
            continue
        model = rounded_model(model_of(*SMALL_WEIGHTS[layout]))
        for number, (prompt, params) in enumerate(zip(*greedy_requests(0), strict=True)):
            expected = oracles_tokens(model, prompt, params)
            for results in found:
                result = results[layout, "int8"][number]
                assert result.token_ids == [token.token_id for token in expected], (layout, params)
                assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=1e-2)


def test_transfers_that_stop_processes_change_nothing(found):
    for layout, name in itertools.product(LAYOUTS[len(found)], TRANSFERS):
        if layout[1] == 1:
            continue
        for rank, results in enumerate(found):
            told = results[layout, name]
            plain = found[0][(layout, *ONE)] * 2
            assert [r.token_ids for r in told["results"]] == [r.token_ids for r in plain]
            assert [r.exit_layers for r in told["results"]] == [r.exit_layers for r in plain]
            scored = zip(told["scores"], found[0][(layout, *ONE, "scored")], strict=True)
            for one, other in scored:
                assert_same_scores(one.prompt_tokens, other.prompt_tokens)
            # A communicator for each neighbour is there before the first request, in a group each.
            neighbours = {rank - layout[0], rank + layout[0]} & set(range(len(found)))
            assert {peer for _, peer in told["communicators"]} == neighbours
            assert len({group for group, _ in told["communicators"]}) == len(neighbours)
            assert told["late"] == []


@needs_compiler
def test_compiled_layers_give_the_oracles_tokens(found):
    """Stages, and ranks that share every layer; more than two ranks compile nothing."""
    for results in found:
        layouts = [key[0] for key in results if key[1:] == ("compiled",)]
        assert layouts == (list(LAYOUTS[2]) if len(found) == 2 else [])
        for layout in layouts:
            model = COMPILED[layout]
            requests = zip(*compiled_requests(model), strict=True)
            for (prompt, params), result in zip(requests, results[layout, "compiled"], strict=True):
                threshold = params.threshold if params.mode == "early_exit" else None
                expected = generate(
                    model_of(*model),
                    prompt,
                    params.max_tokens,
                    threshold,
                    params.exit_layers,
                    propagates=params.kv_policy == "propagate",
                )
                assert result.token_ids == [token.token_id for token in expected], (layout, params)


def test_scores_are_those_of_one_process(found):
    for kind, head in MODELS:
        expected = scored_texts(EarlyExitEngine(model_of(kind, head).segmented))
        told = [
            results[key]
            for results in found
            for key in results
            if key[1:] == (kind, head, "scored")
        ]
        assert told
        for results in told:
            for result, alone in zip(results, expected, strict=True):
                assert_same_scores(result.prompt_tokens, alone.prompt_tokens)


def assert_same_scores(found: list[PromptToken], expected: list[PromptToken]) -> None:
    assert [(token.token_id, token.exit_layer) for token in found] == [
        (token.token_id, token.exit_layer) for token in expected
    ]
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=3e-4)
        assert one.confidence == pytest.approx(other.confidence, rel=3e-4)
        for (_, logprob), (_, well) in zip(one.top_logprobs, other.top_logprobs, strict=True):
            assert logprob == pytest.approx(well, abs=3e-4)


def flat(scores: list[list[list[PromptToken]]]) -> list[PromptToken]:
    """Those of all prompts of all calls."""
    return [token for call in scores for prompt in call for token in prompt]


def test_samples_streams_and_reports_are_those_of_one_process(found):
    engine = EarlyExitEngine(model_of(*ONE).segmented)
    expected = more_of_one(engine)
    ranks = [results[key] for results in found for key in results if key[1:] == ("more",)]
    assert len(ranks) == len(found) * len(LAYOUTS[len(found)])
    for one in ranks:
        for name in ("seeded", "details", "after"):
            for result, alone in zip(one[name], expected[name], strict=True):
                assert result.token_ids == alone.token_ids
                assert result.exit_layers == alone.exit_layers
        for result, alone in zip(one["details"], expected["details"], strict=True):
            reports = [[(head.layer, head.token_id) for head in heads] for heads in result.heads]
            assert reports == [
                [(head.layer, head.token_id) for head in heads] for heads in alone.heads
            ]
        assert [t.token_id for t in one["streamed"]] == [t.token_id for t in expected["streamed"]]
        assert len(one["abandoned"]) == 2
        assert one["idle"][1:] == [[], []]
        assert one["best"] == expected["best"]
        assert one["interrupted"] == expected["after"][0].token_ids
        for scored, alone in zip(flat(one["scores"]), flat(expected["scores"]), strict=True):
            assert scored.token_id == alone.token_id
            assert scored.logprob == pytest.approx(alone.logprob, abs=3e-4)
            assert [token for token, _ in scored.top_logprobs] == [t for t, _ in alone.top_logprobs]
    for layout in {key[0] for key in found[0] if key[1:] == ("more",)}:
        samples = [
            [(r.token_ids, r.top_logprobs) for r in results[layout, "more"]["unseeded"]]
            for results in found
        ]
        assert all(sample == samples[0] for sample in samples)


def test_stages_judge_by_the_measure_of_the_request(found):
    told = [results[key] for results in found for key in results if key[1:] == ("measured",)]
    assert len(told) == len(found) * len(LAYOUTS[len(found)])
    layers = set()
    for params, *results in zip(MEASURED, *told, strict=True):
        rule = rule_of(params)
        expected = generate(
            model_of(*ONE), TEXT[:13], params.max_tokens, pays_at=params.exits_pay_at, **rule
        )
        scored = scores(model_of(*ONE), TEXT[:13], **rule)
        for result in results:
            assert result.token_ids == [token.token_id for token in expected]
            told_of = result.prompt_tokens[1:]
            layers_told = [*result.exit_layers, *(token.exit_layer for token in told_of)]
            assert layers_told == [token.exit_layer for token in expected + scored]
            sure = [*result.confidences, *(token.confidence for token in told_of)]
            known = [token.confidence for token in expected + scored]
            assert sure == pytest.approx(known, rel=3e-4, abs=2e-5)
        layers |= {token.exit_layer for token in expected + scored}
        if params.exits_pay_at:
            # Of a pipeline, the first rank alone keeps the account.
            assert any(result.statistics.num_unasked_tokens for result in results)
    assert len(layers) == 3


@pytest.mark.parametrize("found", [2], indirect=True)
def test_a_mode_that_disagrees_with_its_stages_gets_no_wrong_token(found):
    for leaving, full in (told["disagreement"] for told in found):
        assert (leaving.finish_reason, leaving.token_ids) == ("error", [])
        assert "exception in the engine" in leaving.error
        assert (full.finish_reason, len(full.token_ids)) == ("length", 3)


@pytest.mark.parametrize("found", [2], indirect=True)
def test_faults_end_one_request_alone(found):
    engine = EarlyExitEngine(make_model(exits=(1,)).segmented)
    leaving = SamplingParams(mode="early_exit", early_exit_threshold=0.0)
    (well,) = engine.generate([[7]], leaving)
    for told in (results["faults"] for results in found):
        assert told["heads"] == (
            "tensor_parallel 2 is not possible, allowed: divisors of the model's num_query_groups 1"
        )
        assert told["processes"].startswith("tensor_parallel 4 x pipeline_parallel 1 needs 4 ")
        for name in ("tensor", "pipeline"):
            assert told[name] == [[("error", []), ("length", well.token_ids)]] * 3
            assert told[f"{name}, scored"] == (NOT_FINITE, None)


@pytest.mark.parametrize("found", [2], indirect=True)
def test_requests_that_come_and_go_get_the_oracles_tokens(found):
    plays = [results["arrivals", num_slots] for num_slots in SLOTS for results in found]
    for drawn, *ended in zip(examples(NUM_ARRIVALS), *plays, strict=True):
        for arrival, *results in zip(drawn, *ended, strict=True):
            assert_oracles(model_of(*ONE), arrival, *results)
