"""Distributed checkpoints read back whole, and nothing in them is run."""

import os
import pickle
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.weights import load_weights, stored_weights, weight_shapes
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, make_model, save_checkpoint

CPU = torch.device("cpu")


def load(model, directory, dtype=torch.float32):
    reader = CheckpointReader(directory)
    return load_weights(stored_weights(reader, model.architecture, model.early_exit), dtype, CPU)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "layer by layer"])
@pytest.mark.parametrize("heads", ["projection", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen"])
def test_weights_come_back(tmp_path, architecture, heads, stacked):
    model = make_model(ARCHITECTURES[architecture], exits=(1, 3), **HEADS[heads])
    directory = save_checkpoint(model, tmp_path, stacked=stacked)
    assert_same(load(model, directory), model.weights)


def test_weights_change_dtype(tmp_path):
    model = make_model()
    weights = load(model, save_checkpoint(model, tmp_path), torch.bfloat16)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_halves_of_a_gated_mlp_are_joined(tmp_path):
    model = make_model()
    stored = make_model()
    for name in list(stored.weights):
        if name.endswith("linear_fc1.weight"):
            gate, linear = stored.weights.pop(name).chunk(2)
            stored.weights[f"{name}_w"], stored.weights[f"{name}_v"] = gate, linear
    directory = save_checkpoint(stored, tmp_path, stacked=False)
    assert_same(load(model, directory), model.weights)


def test_a_missing_tensor_is_named(tmp_path):
    model = make_model(exits=(2,), use_exit_norm=True)
    del model.weights["exits.2.norm.weight"]
    with pytest.raises(ValueError, match=r"has no tensor exits.2.norm.weight"):
        load(model, save_checkpoint(model, tmp_path))


def test_another_shape_is_named(tmp_path):
    model = make_model()
    model.weights["decoder.final_layernorm.weight"] = torch.ones(31)
    with pytest.raises(ValueError, match=r"final_layernorm.weight has the shape \(31,\).*\(32,\)"):
        load(model, save_checkpoint(model, tmp_path))


def test_another_depth_is_named(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    deeper = make_model(replace(ARCHITECTURES["llama"], num_layers=5))
    with pytest.raises(ValueError, match="has 4 layers, the model's description wants 5"):
        load(deeper, directory)


def test_damaged_data_is_an_error(tmp_path):
    model = make_model()
    directory = save_checkpoint(model, tmp_path)
    for file in directory.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is missing or damaged"):
        load(model, directory)


class Hostile:
    """Unpickles to a call of a function with a path."""

    def __init__(self, function, path):
        self.call = function, (str(path),)

    def __reduce__(self):
        return self.call


def make_folder(path):
    os.mkdir(path)


def test_an_index_cannot_run_code(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    (directory / ".metadata").write_bytes(pickle.dumps(Hostile(make_folder, tmp_path / "run")))
    with pytest.raises(ValueError, match="cannot be read"):
        CheckpointReader(directory)
    assert not (tmp_path / "run").exists()


def test_an_index_must_be_one(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    (directory / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="holds a dict, not an index"):
        CheckpointReader(directory)


def test_common_state_keeps_values_and_runs_nothing(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    hostile = Hostile(make_folder, tmp_path / "run")
    args = Namespace(num_layers=4, hostile=hostile, dtype=torch.bfloat16)
    torch.save({"args": args, "iteration": 7}, directory / "common.pt")
    state = CheckpointReader(directory).common_state()
    assert state["iteration"] == 7
    assert (state["args"].num_layers, state["args"].dtype) == (4, torch.bfloat16)
    assert not (tmp_path / "run").exists()


def test_unusable_common_state_is_an_error(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    with pytest.raises(ValueError, match="has no common state"):
        CheckpointReader(directory).common_state()
    (directory / "common.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is damaged, or holds what cannot be read safely"):
        CheckpointReader(directory).common_state()
    torch.save({"args": Hostile(os.mkdir, tmp_path / "run")}, directory / "common.pt")
    with pytest.raises(ValueError, match="is damaged, or holds what cannot be read safely"):
        CheckpointReader(directory).common_state()
    assert not (tmp_path / "run").exists()
    torch.save(5, directory / "common.pt")
    with pytest.raises(ValueError, match="is a int, not a dictionary"):
        CheckpointReader(directory).common_state()


def test_locations(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    assert locate(tmp_path).iteration_dir == directory
    assert locate(directory).save_dir == tmp_path
    with pytest.raises(ValueError, match="there is no such directory"):
        locate(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds neither latest_checkpointed_iteration.txt"):
        locate(tmp_path.parent)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("8\n")
    with pytest.raises(ValueError, match="names iter_0000008, which is not a checkpoint"):
        locate(tmp_path)
    tracker.write_text("../../elsewhere")
    with pytest.raises(ValueError, match=r"says '../../elsewhere', not an iteration"):
        locate(tmp_path)
    directory.rename(tmp_path / "release")
    tracker.write_text("release")
    assert locate(tmp_path).iteration_dir == tmp_path / "release"


def test_shapes_name_each_tensor_once():
    model = make_model(exits=(2,), **HEADS["all"])
    shapes = weight_shapes(model.architecture, model.early_exit)
    assert shapes["exits.2.block.self_attention.linear_qkv.weight"] == (64, 32)
    assert shapes["exits.2.mlp.linear_fc1.layer_norm_weight"] == (32,)
    assert shapes["decoder.layers.3.mlp.linear_fc1.weight"] == (96, 32)
