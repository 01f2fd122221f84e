"""Exits added to checkpoints of any origin, taken away, and merged with their base."""

from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint.base import BaseReference, is_of_exit
from megatron.early_exit.checkpoint.description import ModelDescription, read_description
from megatron.early_exit.checkpoint.exits import RandomInit, add_exits, strip_exits
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.source import open_checkpoint, open_parts
from megatron.early_exit.checkpoint.weights import model_weights
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers import saved_checkpoint
from tests.helpers.tiny_models import ARCHITECTURES, GPT2, LLAMA, make_model
from tests.helpers.written_checkpoint import lazy_tensors, write_model

ALL_PARTS = {
    "use_exit_mlp": True,
    "use_exit_block": True,
    "use_exit_norm": True,
    "untie_exit_output_weights": True,
}


def save_plain(save_dir, model, **changed):
    """A checkpoint of Megatron's own training: arguments, padding, the optimizer's state."""
    args = vars(described_args(ModelDescription(model.architecture, model.early_exit, None)))
    tensors = {}
    for name, tensor in model.weights.items():
        if tensor.dim() == 2 and len(tensor) == model.architecture.vocab_size:
            tensor = torch.cat((tensor, torch.full((3, tensor.shape[1]), 9.0)))
        tensors[name] = tensor
    tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(2, 2)
    args |= {"tensor_model_parallel_size": 2, "consumed_train_samples": 99, "lr": 0.5}
    saved_checkpoint.save(save_dir, 7, tensors, **{**args, **changed})
    return save_dir


def read_all(conversion):
    return {name: tensor.read() for name, tensor in conversion.weights.items()}


def exits_at(*layers, **flags):
    return EarlyExitConfig(exit_layer_nums=layers, **flags)


@pytest.mark.parametrize("flags", [{"use_exit_mlp": True}, {}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exit_after_the_last_layer_is_the_model_itself(tmp_path, architecture, flags):
    model = make_model(ARCHITECTURES[architecture])
    untied = not model.architecture.share_embeddings_and_output_weights
    wanted = exits_at(4, use_exit_norm=True, untie_exit_output_weights=untied, **flags)
    add_exits(open_checkpoint(write_model(tmp_path / "base", model)), wanted).write(
        tmp_path / "out"
    )
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "out")
    segments = engine.model
    assert [one.position for one in segments.exits] == [4]
    common = {"max_tokens": 12, "logprobs": 0}
    (full,) = engine.generate([[3, 1, 4]], SamplingParams(**common))
    exit_params = SamplingParams(mode="early_exit", early_exit_threshold=0.0, **common)
    (early,) = engine.generate([[3, 1, 4]], exit_params)
    assert early.exit_layers == [4] * 12
    assert early.token_ids == full.token_ids
    # Both ran the same layers, in steps of other sizes.
    assert early.logprobs == pytest.approx(full.logprobs, abs=1e-5)
    # Of one hidden state the two heads give the same logits, bit for bit.
    hidden = torch.randn(5, model.architecture.hidden_size)
    head = segments.exits[0].head
    at_end = segments.segments[1](hidden, None) if flags else hidden
    assert torch.equal(head.logits(hidden), segments.final_head.logits(at_end))


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_part_is_a_copy_of_the_models_own(tmp_path, architecture):
    model = make_model(architecture)
    source = open_checkpoint(write_model(tmp_path / "base", model))
    added = add_exits(source, exits_at(2, 4, **ALL_PARTS, use_exit_gate=True))
    found = read_all(added)
    gate = {name: found.pop(name) for name in list(found) if ".gate." in name}
    assert {name: tensor.shape for name, tensor in gate.items()} == {
        f"exits.{position}.gate.{name}": shape
        for position in (2, 4)
        for name, shape in (("weight", (1, architecture.hidden_size)), ("bias", (1,)))
    }
    assert not any(tensor.any() for tensor in gate.values())
    output = model.weights.get(
        "output_layer.weight", model.weights["embedding.word_embeddings.weight"]
    )
    for position, block in ((2, 2), (4, 3)):
        assert torch.equal(found[f"exits.{position}.projection.weight"], output)
        copies = {
            f"exits.{position}.norm.": "decoder.final_layernorm.",
            f"exits.{position}.mlp.": f"decoder.layers.{position - 1}.mlp.",
            f"exits.{position}.block.": f"decoder.layers.{block}.",
        }
        for copy, origin in copies.items():
            rests = [name.removeprefix(origin) for name in model.weights if origin in name]
            assert rests
            for rest in rests:
                assert torch.equal(found[copy + rest], model.weights[origin + rest]), copy + rest
                assert added.sources[copy + rest] == (origin + rest,)
    assert {name for name in found if not is_of_exit(name)} == model.weights.keys()


def test_a_checkpoint_of_megatrons_training_gets_exits_and_gives_them_back(tmp_path):
    model = make_model(LLAMA)
    source = open_checkpoint(save_plain(tmp_path / "base", model))
    wanted = exits_at(2, use_exit_norm=True, exit_layer_weight=(0.5,))
    add_exits(source, wanted).write(tmp_path / "with")
    assert read_description(tmp_path / "with").early_exit == wanted
    reader = CheckpointReader(locate(tmp_path / "with").iteration_dir)
    assert not [name for name in reader.tensors if "optimizer" in name]
    args = reader.common_state()["args"]
    assert EarlyExitConfig.from_attributes(args) == wanted
    # The rest of the arguments stays, but for what is no longer so.
    assert (args.lr, args.num_layers) == (0.5, 4)
    assert (args.tensor_model_parallel_size, args.consumed_train_samples) == (1, 0)
    strip_exits(open_checkpoint(tmp_path / "with")).write(tmp_path / "plain")
    plain = open_checkpoint(tmp_path / "plain")
    assert plain.args is not None
    assert plain.args.exit_layer_nums == []
    found = read_all(plain)
    assert found.keys() == model.weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, model.weights[name]), name
    with pytest.raises(ValueError, match=r"^the model has no exits$"):
        strip_exits(plain)


def test_exits_that_the_model_has_are_kept_or_replaced(tmp_path):
    model = make_model(LLAMA, exits=(1, 3), use_exit_norm=True, exit_layer_weight=(0.1, 0.3))
    source = open_checkpoint(write_model(tmp_path / "old", model))
    added = add_exits(source, exits_at(3, 4, use_exit_norm=True))
    config = added.description.early_exit
    assert config.exit_layer_nums == (1, 3, 4)
    assert config.exit_layer_weight == (0.1, 1.0, 1.0)
    found = read_all(added)
    assert torch.equal(found["exits.1.norm.weight"], model.weights["exits.1.norm.weight"])
    for position in (3, 4):
        norm = found[f"exits.{position}.norm.weight"]
        assert torch.equal(norm, model.weights["decoder.final_layernorm.weight"])
    # Placement is no part of a head.
    config = add_exits(source, exits_at(3, use_exit_norm=True, pre_exit=True))
    assert config.description.early_exit.exit_layer_nums == (2, 3, 4)
    assert config.description.early_exit.positions == (1, 2, 3)
    # Nor is the measure of confidence.
    measured = add_exits(source, exits_at(4, use_exit_norm=True, exit_measure="margin"))
    assert measured.description.early_exit.exit_measure == "margin"
    # Nothing is kept, so that other heads are possible.
    other = add_exits(source, exits_at(1, 3, use_exit_mlp=True))
    assert other.description.early_exit.use_exit_norm is False


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (exits_at(2), "has exits with --use-exit-norm and the new ones have no flag of heads"),
        (exits_at(5, use_exit_norm=True), "--exit-layer-nums 5 is out of range, allowed: 1 to 4"),
        (exits_at(3, use_exit_norm=True, pre_exit=True), "has an exit after its last layer 4"),
        (
            exits_at(3, use_exit_norm=True, exit_vocab_size=9),
            "and the new ones have --use-exit-norm --exit-vocab-size 9",
        ),
        (
            exits_at(1, 4, use_exit_norm=True, exit_vocab_size=62),
            "--exit-vocab-size 62 is out of range, allowed: 2 to the 61 tokens of the vocabulary",
        ),
    ],
)
def test_exits_that_do_not_fit_are_refused(tmp_path, wanted, message):
    model = make_model(LLAMA, exits=(1, 4), use_exit_norm=True)
    source = open_checkpoint(write_model(tmp_path, model))
    with pytest.raises(ValueError, match=message):
        add_exits(source, wanted)


@pytest.mark.parametrize("architecture", ["gpt2", "nemotron", "qwen"])
def test_random_weights_are_drawn_as_megatron_draws_them(tmp_path, architecture):
    wide = replace(ARCHITECTURES[architecture], hidden_size=128, ffn_hidden_size=512)
    source = open_checkpoint(write_model(tmp_path, make_model(wide)))
    drawn = [
        read_all(add_exits(source, exits_at(1, 2, **ALL_PARTS), RandomInit(seed, 0.1)))
        for seed in (5, 5, 6)
    ]
    for name, tensor in drawn[0].items():
        assert torch.equal(tensor, drawn[1][name])
        if not is_of_exit(name):
            continue
        if tensor.dim() == 1:
            zero = name.endswith("bias") or wide.layernorm_zero_centered_gamma
            assert tensor.unique().tolist() == [0.0 if zero else 1.0], name
            continue
        scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = 0.1 / 8**0.5 if scaled else 0.1
        assert tensor.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(tensor.mean().item()) < std / 10
        assert not torch.equal(tensor, drawn[2][name])
    assert not torch.equal(
        drawn[0]["exits.1.projection.weight"], drawn[0]["exits.2.projection.weight"]
    )


def test_what_is_left_over_is_refused(tmp_path):
    tensors = {"decoder.layers.9.mlp.router.weight": torch.zeros(2), "more": torch.zeros(2)}
    model = make_model(LLAMA)
    model.weights.update(tensors)
    save_plain(tmp_path, model)
    with pytest.raises(ValueError, match=r"router.weight and 1 more tensors, which the model that"):
        open_checkpoint(tmp_path)


def test_tuned_exits_and_their_base_become_one(tmp_path):
    model = make_model(LLAMA, exits=(1, 3), use_exit_norm=True)
    untuned = make_model(LLAMA, exits=(2,), use_exit_mlp=True)
    base = {name: tensor for name, tensor in model.weights.items() if not is_of_exit(name)}
    at = save_plain(tmp_path / "base", replace(untuned, weights={**untuned.weights, **base}))
    location = locate(at)
    whole = open_checkpoint(at)
    description = whole.description
    reference = BaseReference.of(location, model_weights(location, description))
    tuned = {name: tensor for name, tensor in model.weights.items() if is_of_exit(name)}
    only = ModelDescription(LLAMA, model.early_exit, None, reference)
    write_checkpoint(tmp_path / "exits", lazy_tensors(tuned), only, described_args(only))
    (tmp_path / "base").rename(tmp_path / "moved")
    open_parts(tmp_path / "moved", tmp_path / "exits").write(tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    assert merged.description.early_exit == model.early_exit
    assert merged.description.base is None
    assert merged.args is not None
    assert (merged.args.lr, merged.args.exit_layer_nums) == (0.5, [1, 3])
    found = read_all(merged)
    assert found.keys() == model.weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, model.weights[name]), name
    with pytest.raises(ValueError, match="holds a whole model, there is nothing to merge"):
        open_parts(tmp_path / "exits", tmp_path / "moved")
    other = save_plain(tmp_path / "other", make_model(LLAMA, seed=1))
    with pytest.raises(ValueError, match="is not the one that the exits were tuned on"):
        open_parts(other, tmp_path / "exits").write(tmp_path / "never")
    assert not (tmp_path / "never").exists()
