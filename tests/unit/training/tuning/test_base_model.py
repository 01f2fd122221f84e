"""Exits-only checkpoints find their backbone in another checkpoint, and take no other."""

import shutil
from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint.base import BaseReference, is_of_exit
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.weights import model_weights
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.tiny_models import LLAMA, make_model
from tests.helpers.written_checkpoint import lazy_tensors

MODEL = make_model(LLAMA, exits=(1, 3), use_exit_norm=True)
PLAIN = ModelDescription(LLAMA, EarlyExitConfig(), None)


def save(path, weights, description):
    write_checkpoint(path, lazy_tensors(weights), description, described_args(description))
    return path


def backbone():
    return {name: tensor for name, tensor in MODEL.weights.items() if not is_of_exit(name)}


def exits_only(path, base):
    location = locate(base)
    reference = BaseReference.of(location, model_weights(location, PLAIN))
    weights = {name: tensor for name, tensor in MODEL.weights.items() if is_of_exit(name)}
    return save(path, weights, ModelDescription(LLAMA, MODEL.early_exit, None, reference))


def tokens(path):
    engine = EarlyExitEngine.from_checkpoint(path)
    params = SamplingParams(mode="early_exit", early_exit_threshold=0.5, max_tokens=9)
    return engine.generate([[1, 2, 3]], params)[0].token_ids


def test_the_two_are_one_model(tmp_path):
    whole = save(tmp_path / "whole", MODEL.weights, replace(PLAIN, early_exit=MODEL.early_exit))
    base = save(tmp_path / "base", backbone(), PLAIN)
    assert tokens(exits_only(tmp_path / "exits", base)) == tokens(whole)


def test_another_base_is_refused(tmp_path):
    base = save(tmp_path / "base", backbone(), PLAIN)
    exits = exits_only(tmp_path / "exits", base)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"their base .* is not there: put it back, or join"):
        tokens(exits)
    changed = backbone()
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    changed[name] = changed[name].clone()
    changed[name][0, 0] += 1e-3
    save(base, changed, PLAIN)
    with pytest.raises(ValueError, match=rf"^{name} is not the one that the exits were tuned on"):
        tokens(exits)


def test_a_base_of_another_kind_is_refused():
    reference = BaseReference("/base", {"a": "0", "b": "1"})
    with pytest.raises(ValueError, match=r"has other tensors than /base.*: b is in one"):
        reference.checked(lazy_tensors({"a": torch.zeros(1)}))
