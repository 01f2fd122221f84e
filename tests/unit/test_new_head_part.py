"""The worked example of the docs: a new part of a head, from training over files to the engine."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402

from megatron.early_exit import config as config_module  # noqa: E402
from megatron.early_exit.checkpoint import description, exits  # noqa: E402
from megatron.early_exit.checkpoint.exits import add_exits  # noqa: E402
from megatron.early_exit.checkpoint.reader import CheckpointReader  # noqa: E402
from megatron.early_exit.checkpoint.source import open_checkpoint  # noqa: E402
from megatron.early_exit.checkpoint.weights import (  # noqa: E402
    load_weights,
    stored_weights,
    weight_shapes,
)
from megatron.early_exit.config import HEAD_PARTS, EarlyExitConfig, HeadPart  # noqa: E402
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams  # noqa: E402
from megatron.early_exit.inference.model import segmented_model  # noqa: E402
from megatron.early_exit.inference.model.segmented_model import SegmentedModel  # noqa: E402
from megatron.early_exit.model import exit_head  # noqa: E402
from megatron.early_exit.planner.costs.model_shape import part_weights  # noqa: E402
from megatron.early_exit.training.loss.exit_loss import (  # noqa: E402
    ExitObjective,
    LossNormalization,
)
from tests.helpers.exit_models import Microbatch, build_model  # noqa: E402
from tests.helpers.megatron_model import BACKBONES, architecture, megatron_logits  # noqa: E402
from tests.helpers.single_process import model_parallel  # noqa: E402
from tests.helpers.tiny_models import TinyModel, make_model  # noqa: E402
from tests.helpers.written_checkpoint import write_model  # noqa: E402

SCALE = HeadPart(
    field="use_exit_scale",
    module="scale",
    tensors={"weight": ("hidden_size",)},
    initial=1.0,
    help_when_added="own scale of the hidden state, which starts as 1",
    help_when_planned="each exit scales the hidden state",
)


@dataclass(frozen=True, kw_only=True)
class WithScale(EarlyExitConfig):
    """The field that the flag is made of."""

    use_exit_scale: bool = False


class Scale(torch.nn.Module):
    """The part in training."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))


def build_scale(head, around) -> None:
    head.scale = Scale(head.config.hidden_size)


def run_scale(head, hidden, layer_kwargs):
    return hidden * head.scale.weight


def scale_of_engine(model, weights, prefix):
    weight = weights[f"{prefix}weight"]
    return lambda hidden: hidden * weight


OPTIONS = WithScale(exit_layer_nums=(1, 3), use_exit_norm=True, use_exit_scale=True)


@pytest.fixture(autouse=True)
def scale(monkeypatch):
    """What somebody would write into the files."""
    norm = next(i for i, part in enumerate(HEAD_PARTS) if part.module == "norm")
    parts = (*HEAD_PARTS[: norm + 1], SCALE, *HEAD_PARTS[norm + 1 :])
    for module in (config_module, exits):
        monkeypatch.setattr(module, "HEAD_PARTS", parts)
    # In the package it would be a field of the class itself.
    monkeypatch.setattr(EarlyExitConfig, "use_exit_scale", False, raising=False)
    monkeypatch.setattr(description, "EarlyExitConfig", WithScale)
    part = exit_head.PartModule(build_scale, run_scale)
    monkeypatch.setitem(exit_head.PARTS, "scale", part)
    monkeypatch.setitem(segmented_model.BRANCH_PARTS, "scale", scale_of_engine)


def test_what_it_takes():
    written = (Scale, build_scale, run_scale, scale_of_engine)
    lines = sum(len(inspect.getsource(one).splitlines()) for one in written)
    # The table's entry, the field with its help text, and an entry in each table of modules.
    lines += 8 + 3 + 2
    print(f"a new part of a head: 3 files, {lines} lines")
    assert lines <= 80


def test_it_trains_and_the_engine_reads_what_megatron_saves(tmp_path):
    from megatron.core import dist_checkpointing

    batch, backbone = Microbatch(1), BACKBONES["llama"]
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    objective = ExitObjective(OPTIONS, normalization, chunk_tokens=5)
    with model_parallel():
        model = build_model(OPTIONS, **backbone)
        head = model.exits.heads[1]
        hidden = torch.randn(3, 2, head.config.hidden_size)
        plain = head.branch(hidden, {})
        with torch.no_grad():
            head.scale.weight.copy_(torch.linspace(0.5, 2, len(head.scale.weight)))
        assert torch.equal(head.branch(hidden, {}), plain * head.scale.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            model.exit_tap = objective
            objective.start_iteration(step)
            objective.set_loss_scale(torch.tensor([1.0]))
            optimizer.zero_grad()
            (batch.final_loss(model) / batch.tokens_that_count).backward()
            assert head.scale.weight.grad.any()
            optimizer.step()
            taken = objective.training_metrics.take_means(model.pg_collection, torch.device("cpu"))
            losses.append(sum(loss for name, loss in taken.items() if "loss" in name))
        assert losses == sorted(losses, reverse=True)
        tokens = batch.tokens[0, :-1]
        with torch.no_grad():
            expected = megatron_logits(model.eval(), tokens)
        (tmp_path / "iter_0000001").mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path / "iter_0000001"))
    shape, reader = architecture(backbone), CheckpointReader(tmp_path / "iter_0000001")
    weights = load_weights(
        stored_weights(reader, shape, OPTIONS), torch.float32, torch.device("cpu")
    )
    engine = EarlyExitEngine(SegmentedModel(shape, OPTIONS, weights))
    for position in OPTIONS.positions:
        params = SamplingParams(
            mode="early_exit", early_exit_threshold=0.0, exit_layers=[position], max_tokens=1
        )
        (found,) = engine.generate([tokens.tolist()], params)
        confidence, token = expected[position][-1].softmax(-1).max(-1)
        assert found.token_ids == [int(token)]
        assert found.confidences == pytest.approx([float(confidence)], rel=1e-4)


def test_it_is_saved_loaded_and_decoded_with(tmp_path):
    model = make_model(exits=(1, 3), use_exit_norm=True)
    shapes = weight_shapes(model.architecture, OPTIONS)
    size = model.architecture.hidden_size
    assert shapes["exits.3.scale.weight"] == (size,)
    weights, folded = dict(model.weights), dict(model.weights)
    for position in OPTIONS.positions:
        scale = torch.linspace(0.5, 1.5, size).roll(position)
        weights[f"exits.{position}.scale.weight"] = scale
        # A scale behind a norm without a bias is another gain of the norm.
        folded[f"exits.{position}.norm.weight"] = (
            model.weights[f"exits.{position}.norm.weight"] * scale
        )
    assert weights.keys() == shapes.keys()
    path = write_model(tmp_path / "model", TinyModel(model.architecture, OPTIONS, weights))
    engine = EarlyExitEngine.from_checkpoint(path)
    plain = EarlyExitEngine(replace(model, weights=folded).segmented)
    for threshold in (0.0, 0.3, 0.6):
        params = SamplingParams(
            mode="early_exit", early_exit_threshold=threshold, max_tokens=8, exit_details=True
        )
        for prompt in ([1, 2, 3], [9, 40]):
            ((found,), (expected,)) = (one.generate([prompt], params) for one in (engine, plain))
            assert found.token_ids == expected.token_ids
            assert found.exit_layers == expected.exit_layers
            assert found.confidences == pytest.approx(expected.confidences, rel=1e-4)


def test_it_is_added_to_a_model_and_planned(tmp_path):
    model = make_model()
    size = model.architecture.hidden_size
    added = add_exits(open_checkpoint(write_model(tmp_path / "base", model)), OPTIONS)
    added.write(tmp_path / "with")
    weights = open_checkpoint(tmp_path / "with").weights
    assert torch.equal(weights["exits.1.scale.weight"].read(), torch.ones(size))
    # Vectors do not count, matrices do.
    assert part_weights(SCALE, model.architecture) == 0
    matrix = replace(SCALE, tensors={"weight": ("hidden_size", 3)})
    assert part_weights(matrix, model.architecture) == 3 * size
