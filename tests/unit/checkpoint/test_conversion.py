"""Conversions check what they have written, and leave nothing of what went wrong."""

import re
import resource
from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint import conversion
from megatron.early_exit.checkpoint.conversion import Conversion, match_table
from megatron.early_exit.checkpoint.description import ModelDescription
from tests.helpers.tiny_models import LLAMA, make_model
from tests.helpers.written_checkpoint import lazy_tensors

MODEL = make_model(LLAMA, exits=(1, 3), use_exit_mlp=True)


def make():
    description = ModelDescription(LLAMA, MODEL.early_exit, None)
    sources = {name: (name.replace("linear_qkv", "query"), "more") for name in MODEL.weights}
    return Conversion(description, lazy_tensors(MODEL.weights), sources)


def test_every_tensor_is_told_twice(tmp_path):
    told = []
    made = make()
    made.write(tmp_path / "out", lambda name, num_bytes: told.append((name, num_bytes)))
    assert sorted(told) == sorted(
        2 * [(name, tensor.num_bytes) for name, tensor in made.weights.items()]
    )
    assert sum(num_bytes for _, num_bytes in told) == 2 * made.num_bytes


def test_a_tensor_that_is_not_found_as_it_was_written_is_refused(tmp_path, monkeypatch):
    def disturbed(*arguments, **options):
        found = dict(stored_weights(*arguments, **options))
        name = "decoder.layers.2.mlp.linear_fc2.weight"
        read = found[name].read
        found[name] = replace(found[name], read=lambda: read().nextafter(torch.tensor(1e9)))
        return found

    stored_weights = conversion.stored_weights
    monkeypatch.setattr(conversion, "stored_weights", disturbed)
    message = r"^decoder.layers.2.mlp.linear_fc2.weight differs from what was written"
    with pytest.raises(ValueError, match=message):
        make().write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/out cannot be written"):
            make().write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_line_for_each_kind_of_tensor():
    made = make()
    lines = [" ".join(line.split()) for line in match_table(made.sources, made.weights)]
    qkv = "decoder.layers.N.self_attention.linear_qkv.weight"
    assert f"4 x {qkv} <- {qkv.replace('linear_qkv', 'query')} + more [64, 32]" in lines
    name = "exits.N.mlp.linear_fc1.weight"
    assert f"2 x {name} <- {name} + more [96, 32]" in lines
    assert sum(int(line.split()[0]) for line in lines) == len(made.weights)
