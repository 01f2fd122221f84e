"""Imported models over two processes: tokens and log-probabilities are those of transformers."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.checkpoint.huggingface import import_hf
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.huggingface_models import (
    KINDS,
    PROMPT,
    make_hf_reference,
    reference_logits,
    reference_tokens,
    save_hf_reference,
)
from tests.helpers.spawn import spawn

LENGTH = 64
LAYOUTS = {"tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}}


def generate(
    folder: str, wanted: list[tuple[str, str]]
) -> dict[tuple[str, str], tuple[list, list]]:
    """On each rank: tokens and their log-probabilities, by kind and layout."""
    found = {}
    for kind, layout in wanted:
        engine = EarlyExitEngine.from_checkpoint(
            f"{folder}/{kind}", max_sequence_length=96, **LAYOUTS[layout]
        )
        (result,) = engine.generate([PROMPT], SamplingParams(max_tokens=LENGTH))
        engine.close()
        found[kind, layout] = (result.token_ids, result.logprobs)
    return found


def test_two_processes_compute_what_transformers_does(tmp_path):
    references = {kind: make_hf_reference(kind, num_hidden_layers=4) for kind in KINDS}
    for kind, reference in references.items():
        import_hf(save_hf_reference(reference, tmp_path / f"hf {kind}")).write(tmp_path / kind)
    # Two processes cannot share a single group of heads.
    divisible = [
        kind for kind, reference in references.items() if reference.config.num_key_value_heads > 1
    ]
    wanted = [(kind, "pp2") for kind in KINDS] + [(kind, "tp2") for kind in divisible]
    first, second = spawn(generate, 2, str(tmp_path), wanted)
    assert first == second
    for (kind, _), (tokens, logprobs) in first.items():
        assert tokens == reference_tokens(references[kind], PROMPT, LENGTH), kind
        logits = reference_logits(references[kind], [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
        own = torch.log_softmax(logits, dim=-1)[range(LENGTH), tokens]
        assert logprobs == pytest.approx(own.tolist(), abs=2e-4), kind
