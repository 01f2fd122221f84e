"""Engines that benchmarks compare with: they get the same weights, and are refused where they are
not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from decode_models import HuggingFace, Weights
from peer_openvino import OpenVino, missing_reason

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.tiny_models import make_model

PIPELINE = """
class GenerationConfig: pass


class TokenizedInputs:
    def __init__(self, tokens, mask):
        assert tokens.shape == mask.shape
        self.tokens = tokens


class LLMPipeline:
    def __init__(self, path, device, **options):
        if path == "none.gguf":
            raise RuntimeError("no such\\nfile")
        assert options == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
        print("noise")

    def generate(self, inputs, config):
        print("more noise")
        assert config.ignore_eos and not config.do_sample
        short = (inputs.tokens[0, 0] == 9) * 1
        class Found:
            tokens = [[1] * (config.max_new_tokens - short) for _ in inputs.tokens]
        return Found
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An interpreter that finds packages of these names."""
    (tmp_path / "openvino_genai.py").write_text(PIPELINE)
    (tmp_path / "openvino.py").write_text("def Tensor(values): return values")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Path(sys.executable)


def test_openvino_answers_with_its_seconds(installed):
    assert missing_reason(installed) is None
    peer = OpenVino(installed, Path("a.gguf"), "f32", 2, "wall")
    try:
        assert 0 < peer.seconds_per_token([[1, 2], [3, 4]], 4) < 60
        assert 0 < peer.seconds_per_token([[1, 2]], 2) < 60
        # An answer that ends early would be counted as if it were fast.
        with pytest.raises(SystemExit, match=r"1 answers of \{3\} tokens"):
            peer.seconds_per_token([[9, 2]], 4)
        with pytest.raises(SystemExit, match="has ended"):
            peer.seconds_per_token([[1, 2]], 4)
    finally:
        peer.close()


def test_openvino_says_why_it_cannot_load_a_model(installed):
    with pytest.raises(SystemExit, match="OpenVINO: no such file"):
        OpenVino(installed, Path("none.gguf"), "f32", 2, "wall")


def test_interpreters_without_openvino_are_refused(tmp_path):
    assert "is not given, allowed: an interpreter" in missing_reason(None)
    assert "cannot be run" in missing_reason(tmp_path / "python")
    found = missing_reason(Path(sys.executable))
    assert "cannot import openvino_genai (ModuleNotFoundError" in found


def test_transformers_has_the_same_weights():
    model = make_model(exits=(1, 3))
    weights = Weights(model.architecture, model.early_exit, model.weights)
    prompts = [[5, 6, 7], [8, 9, 10]]
    found = HuggingFace(weights).answer(prompts, 6)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    results = EarlyExitEngine(model.segmented, max_batch_size=2).generate(prompts, params)
    assert found == [one.token_ids for one in results]
