"""A multi-token-prediction module drafts on tensor-parallel ranks; on stages of a pipeline an exit
does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.mtp_models import mtp_model
from tests.helpers.reference_decoder import choices
from tests.helpers.spawn import spawn
from tests.helpers.tiny_models import TinyModel, save_checkpoint

COUNT = 14
PROMPTS = [[5, 17, 3, 44, 8], [9] * 3, [(7 * i * i + i) % 61 for i in range(21)]]
MTP = SamplingParams(
    mode="self_speculative", draft_method="mtp", draft_confidence=1e-9, max_tokens=COUNT
)
AUTO = SamplingParams(mode="self_speculative", max_tokens=COUNT)


@cache
def model() -> TinyModel:
    return mtp_model(2, noise=0.2, exits=(1, 3), use_exit_norm=True)


def run(folder: str) -> dict[str, Any]:
    """What each layout answers, and what it refuses."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    path = Path(folder)
    engine = EarlyExitEngine.from_checkpoint(path, device="cpu", tensor_parallel=2)
    found["tensor"] = [engine.generate(PROMPTS, params) for params in (MTP, AUTO)]
    engine.close()
    engine = EarlyExitEngine.from_checkpoint(
        path, device="cpu", tensor_parallel=2, draft_vocab_size=31, weight_dtype="int8"
    )
    found["small"] = [engine.generate(PROMPTS, params) for params in (MTP, SamplingParams())]
    engine.close()
    engine = EarlyExitEngine.from_checkpoint(path, device="cpu", pipeline_parallel=2)
    found["pipeline"] = engine.generate(PROMPTS, AUTO)
    found["refused"] = refusal(lambda: engine.generate(PROMPTS, MTP))
    engine.close()
    found["no module"] = refusal(
        lambda: EarlyExitEngine.from_checkpoint(
            path, device="cpu", pipeline_parallel=2, draft_vocab_size=31
        )
    )
    return found


def refusal(call: Any) -> str:
    try:
        call()
    except FieldError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(model(), folder)
    write_description(folder, ModelDescription(model().architecture, model().early_exit, None))
    return spawn(run, 2, str(folder))


def test_texts_are_the_full_models(ranks):
    for found in ranks:
        for results in (*found["tensor"], found["pipeline"]):
            for prompt, result in zip(PROMPTS, results, strict=True):
                expected = choices(model(), prompt, result.token_ids, None)
                assert result.token_ids == [token.token_id for token in expected]
                assert len(result.token_ids) == COUNT
        drafting, full = found["small"]
        for one, other in zip(drafting, full, strict=True):
            assert one.token_ids == other.token_ids[:COUNT]


def test_who_drafts(ranks):
    for found in ranks:
        for results in (found["tensor"][0], found["small"][0]):
            assert sum(one.statistics.drafts.mtp_accepted for one in results) > 0
        for one in found["pipeline"]:
            assert one.statistics.drafts.mtp_drafted == 0


def test_what_stages_of_a_pipeline_refuse(ranks):
    for found in ranks:
        assert found["refused"].startswith("draft_method 'mtp' needs a multi-token-prediction")
        assert found["no module"].startswith("draft_vocab_size 31 needs a multi-token-prediction")
