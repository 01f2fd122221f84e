"""Engines over several processes of which only rank 0 gets requests."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.distributed.control import ControlPlane
from megatron.early_exit.inference.engine import scoring
from tests.helpers.spawn import spawn
from tests.helpers.tiny_models import HEADS, make_model, save_checkpoint

MODEL = make_model(exits=(1, 3), **HEADS["all"])
LAYOUTS = ((2, 1), (1, 2), (2, 2))
"""Tensor and pipeline parallel sizes."""
TEXT = [position * 7 % 61 for position in range(23)]
SAMPLED = SamplingParams(max_tokens=8, temperature=1.2, top_p=0.9, mode="early_exit")
PARAMS = [
    SamplingParams(max_tokens=6),
    SamplingParams(max_tokens=9, mode="early_exit", early_exit_threshold=0.6, logprobs=2),
    SamplingParams(max_tokens=7, mode="self_speculative", draft_exit_layer=3),
    SamplingParams(max_tokens=8, temperature=1.2, seed=3, stop_token_ids=(1, 2, 3)),
    SamplingParams(max_tokens=4, prompt_logprobs=2),
    SamplingParams(max_tokens=0, prompt_logprobs=0),
]


def drive(engine: EarlyExitEngine) -> dict[str, Any]:
    """What a server does: requests of every kind come, some are refused or given up."""
    told: dict[str, Any] = {"idle": [engine.step() for _ in range(3000)]}
    abandoned = engine.submit(TEXT, SamplingParams(max_tokens=30))
    engine.step()
    requests = []
    for params in PARAMS:
        requests.append(engine.submit(TEXT, params))
        given_up = engine.submit([1, 2], SAMPLED)
        with pytest.raises(ValueError, match="allowed"):
            engine.submit([99], SAMPLED)
        with pytest.raises(ValueError, match="allowed"):
            engine.submit(TEXT, SamplingParams(mode="early_exit", exit_layers=(2,)))
        engine.step()
        engine.cancel(given_up)
        engine.cancel(given_up)
    engine.cancel(abandoned)
    told["given up"] = abandoned.finish_reason
    while not all(request.is_finished for request in requests):
        engine.step()
    told["results"] = [request.result() for request in requests]
    told["sampled"] = engine.generate([[5], TEXT], SAMPLED)
    unscored = engine.submit(TEXT, PARAMS[-1])
    engine.step()
    engine.cancel(unscored)
    told["unscored"] = unscored.result().prompt_tokens
    decoding = engine.submit([1, 2], SamplingParams(max_tokens=30))
    request = engine.submit(TEXT, PARAMS[-1])
    while not request.is_finished:
        engine.step()
    told["meanwhile"] = len(decoding.tokens)
    engine.cancel(decoding)
    stream = engine.stream(TEXT, PARAMS[1])
    told["streamed"] = [next(stream).token_id for _ in range(3)]
    stream.close()
    told["best"] = engine.argmax_tokens(TEXT)
    told["after"] = engine.generate([[4, 4]], SamplingParams(max_tokens=5))
    # The end comes whatever is under way.
    engine.submit(TEXT, SAMPLED)
    engine.step()
    return told


def drive_or_follow(folder: str, layout: tuple[int, int]) -> dict[str, Any]:
    """What rank 0 has got, or how often another rank has waited for it; and what is left over."""
    found: dict[str, Any] = {"messages": 0}
    receive = ControlPlane.receive

    def counted(control: ControlPlane, wait: bool = True) -> Any:
        found["messages"] += 1
        return receive(control, wait)

    ControlPlane.receive = counted
    scoring.CHUNK = 3
    tensor, pipeline = layout
    engine = EarlyExitEngine.from_checkpoint(
        folder,
        device="cpu",
        max_batch_size=3,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        has_driver=True,
    )
    if engine.is_worker:
        for refused in (engine.argmax_tokens, engine.generate):
            with pytest.raises(ValueError, match="makes no requests"):
                refused([[1]])
        engine.work()
    else:
        with pytest.raises(ValueError, match="work is not possible"):
            engine.work()
        found |= drive(engine)
    engine.close()
    found["left"] = sum(isinstance(one, scoring.TextScorer) for one in gc.get_objects())
    return found


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def found(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What every rank has found."""
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(MODEL, folder)
    write_description(folder, ModelDescription(MODEL.architecture, MODEL.early_exit, None))
    return spawn(drive_or_follow, math.prod(request.param), str(folder), request.param)


def test_rank_0_gets_what_one_process_gives(found):
    told, alone = found[0], drive(EarlyExitEngine(MODEL.segmented, max_batch_size=3))
    assert told["given up"] == "cancelled"
    for name in ("results", "after"):
        for result, expected in zip(told[name], alone[name], strict=True):
            assert result.token_ids == expected.token_ids
            assert result.exit_layers == expected.exit_layers
            assert result.finish_reason == expected.finish_reason
            assert (result.prompt_tokens is None) == (expected.prompt_tokens is None)
            for score, other in zip(
                result.prompt_tokens or (), expected.prompt_tokens or (), strict=True
            ):
                assert score.token_id == other.token_id
                assert score.logprob == pytest.approx(other.logprob, abs=3e-4)
    assert told["unscored"] is None
    assert told["meanwhile"] > 2
    assert told["streamed"] == alone["streamed"]
    assert told["best"] == alone["best"]
    assert [len(result.token_ids) for result in told["sampled"]] == [8, 8]


def test_what_scores_texts_is_not_kept(found):
    assert [results["left"] for results in found] == [0] * len(found)


def test_followers_wait_while_rank_0_is_idle(found):
    assert not any(found[0]["idle"])
    for results in found[1:]:
        # A few for each step with work to do, of which there are far fewer than the idle ones.
        assert 10 < results["messages"] < 1500


def test_one_process_has_nobody_to_follow():
    engine = EarlyExitEngine(MODEL.segmented)
    assert not engine.is_worker
    with pytest.raises(ValueError, match="work is not possible"):
        engine.work()
