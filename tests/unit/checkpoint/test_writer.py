"""Checkpoints written from tensors that are read one at a time."""

import pytest
import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import ModelDescription, read_description
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args, plain_args
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.weights import load_weights, stored_weights
from megatron.early_exit.checkpoint.writer import new_directory, write_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, MTP, make_model
from tests.helpers.written_checkpoint import lazy_tensors


@pytest.mark.parametrize("heads", ["projection", "all"])
@pytest.mark.parametrize(
    "architecture", (ARCHITECTURES | MTP).values(), ids=(ARCHITECTURES | MTP).keys()
)
def test_a_model_comes_back(tmp_path, architecture, heads):
    model = make_model(architecture, exits=(1, 3), **HEADS[heads])
    description = ModelDescription(model.architecture, model.early_exit, None)
    told = []
    write_checkpoint(
        tmp_path,
        lazy_tensors(model.weights),
        description,
        described_args(description),
        lambda name, num_bytes: told.append((name, num_bytes)),
    )
    assert dict(told) == {name: t.numel() * t.itemsize for name, t in model.weights.items()}
    assert read_description(tmp_path) == description
    location = locate(tmp_path)
    assert location.iteration_dir.name == "release"
    reader = CheckpointReader(location.iteration_dir)
    stored = stored_weights(reader, model.architecture, model.early_exit)
    found = load_weights(stored, torch.float32, torch.device("cpu"))
    assert found.keys() == model.weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, model.weights[name]), name
    args = reader.common_state()["args"]
    assert Architecture.from_args(args) == model.architecture
    assert EarlyExitConfig.from_attributes(args) == model.early_exit
    assert vars(plain_args(args)) == vars(args)


def test_tensors_are_read_one_after_the_other(tmp_path):
    model = make_model()
    order = []

    def watched(name, tensor):
        def read():
            order.append(("read", name))
            return tensor

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read)

    description = ModelDescription(model.architecture, model.early_exit, None)
    weights = {name: watched(name, tensor) for name, tensor in model.weights.items()}
    args = described_args(description)
    write_checkpoint(
        tmp_path, weights, description, args, lambda name, _: order.append(("written", name))
    )
    assert order == [(event, name) for name in weights for event in ("read", "written")]


def test_nothing_is_left_of_what_went_wrong(tmp_path):
    model = make_model()
    weights = lazy_tensors(model.weights)

    def fail():
        raise ValueError("a shard is missing")

    broken = weights["output_layer.weight"]
    weights["output_layer.weight"] = LazyTensor(broken.shape, broken.dtype, fail)
    description = ModelDescription(model.architecture, model.early_exit, None)
    with (
        pytest.raises(ValueError, match=r"^a shard is missing$"),
        new_directory(tmp_path / "out") as partial,
    ):
        write_checkpoint(partial, weights, description, described_args(description))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists already"), new_directory(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as partial:
        (partial / "new").write_text("x")
    assert (tmp_path / "empty" / "new").read_text() == "x"
