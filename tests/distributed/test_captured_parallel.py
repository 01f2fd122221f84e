"""Captured steps of divided models, with a recorder that a CPU can play: the oracle's tokens."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.distributed.parallel_backend import parallel_model
from megatron.early_exit.inference.distributed.process_groups import join, own_part
from megatron.early_exit.inference.model.runner import SegmentRunner
from tests.helpers.cpu_recorder import CpuRecorder, recorded_steps
from tests.helpers.reference_decoder import generate
from tests.helpers.spawn import spawn
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, TinyModel, make_model

LAYOUTS = {"tensor": (2, 1), "pipeline": (1, 2)}
MODELS = [("llama", "all"), ("gpt2", "mlp"), ("llama", "norm")]
PROMPTS = [[5, 17, 3, 44, 8], [7], [9, 9, 2]]
THRESHOLDS = (None, 0.3, 0.3)


def model_of(architecture: str, heads: str) -> TinyModel:
    # Its 61 tokens do not divide evenly.
    return make_model(ARCHITECTURES[architecture], exits=(1, 3), **HEADS[heads])


def params() -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=8)
        if threshold is None
        else SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=threshold)
        for threshold in THRESHOLDS
    ]


def generate_captured() -> dict[Any, Any]:
    """For each layout and model the tokens and exit layers, and what was captured on the way."""
    found: dict[Any, Any] = {}
    for name, layout in LAYOUTS.items():
        place, _ = join(*layout, "cpu")
        for one in MODELS:
            model, recorder = model_of(*one), CpuRecorder()
            parts = {
                tensor: own_part(place, model.architecture, model.early_exit, tensor, whole)
                for tensor, whole in model.weights.items()
            }
            own = {tensor: part for tensor, part in parts.items() if part is not None}
            with (
                recorded_steps(recorder),
                # All heads are replayed.
                patch.object(SegmentRunner, "exit_logits", None),
                patch.object(SegmentRunner, "final_logits", None),
            ):
                segmented, backend = parallel_model(
                    place, model.architecture, model.early_exit, own, compile_rows=True
                )
                engine = EarlyExitEngine(segmented, backend=backend, max_batch_size=4)
                captured = recorder.count
                results = engine.generate(PROMPTS, params())
                engine.close()
            told = [(result.token_ids, result.exit_layers) for result in results]
            found[name, one] = (told, recorder.count - captured, recorder.replays)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[Any, Any]]:
    return spawn(generate_captured, 2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("one", MODELS)
def test_tokens_are_the_oracles(found, name, one):
    model = model_of(*one)
    for results in found:
        told, num_captured, num_replays = results[name, one]
        assert num_captured == 0
        assert num_replays > 8
        for prompt, threshold, (tokens, layers) in zip(PROMPTS, THRESHOLDS, told, strict=True):
            expected = generate(model, prompt, 8, threshold)
            assert tokens == [token.token_id for token in expected]
            assert layers == [token.exit_layer for token in expected]
