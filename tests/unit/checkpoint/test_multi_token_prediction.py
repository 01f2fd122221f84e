"""Multi-token-prediction modules are added, kept and removed."""

from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.base import BaseReference, is_of_exit, is_of_mtp
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.exits import RandomInit, add_exits, strip_exits
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.multi_token_prediction import add_mtp, strip_mtp
from megatron.early_exit.checkpoint.source import open_checkpoint, open_parts
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.tiny_models import ARCHITECTURES, LLAMA, MTP, TinyModel, make_model
from tests.helpers.written_checkpoint import lazy_tensors, write_model

EXITS = EarlyExitConfig(exit_layer_nums=(2,), use_exit_norm=True)


def read(conversion):
    return {name: tensor.read() for name, tensor in conversion.weights.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_a_new_layer_is_a_copy_of_the_last(tmp_path, name):
    model = make_model(ARCHITECTURES[name], exits=(2,))
    made = add_mtp(open_checkpoint(write_model(tmp_path / "base", model)), 2)
    made.write(tmp_path / "with")
    written = open_checkpoint(tmp_path / "with")
    found = read(written)
    assert_same({n: t for n, t in found.items() if not is_of_mtp(n)}, model.weights)
    own = {n: t for n, t in found.items() if is_of_mtp(n)}
    size = model.architecture.hidden_size
    for layer in range(2):
        prefix = f"mtp.layers.{layer}."
        projection = own.pop(f"{prefix}eh_proj.weight")
        embedding, hidden = torch.randn(2, 5, size)
        assert torch.equal(torch.cat((embedding, hidden), dim=1) @ projection.T, hidden)
        shift = 1.0 if model.architecture.layernorm_zero_centered_gamma else 0.0
        assert own.pop(f"{prefix}enorm.weight").unique().tolist() == [1.0 - shift]
        # The final norm and then this one are one norm, and a scale.
        final = model.weights["decoder.final_layernorm.weight"] + shift
        both = (own.pop(f"{prefix}hnorm.weight") + shift) * final
        torch.testing.assert_close(both, both.mean().expand(size))
        assert both.mean() > 0
        for norm in ("enorm", "hnorm"):
            bias = own.pop(f"{prefix}{norm}.bias", torch.zeros(size))
            assert torch.equal(bias, torch.zeros(size))
        for key in [key for key in own if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            origin = f"decoder.layers.3.{rest.removeprefix('transformer_layer.')}"
            if rest.startswith("final_layernorm."):
                origin = f"decoder.{rest}"
            assert torch.equal(own.pop(key), model.weights[origin]), key
            assert made.sources[key] == (origin,)
    assert not own
    assert written.description.architecture == replace(model.architecture, mtp_num_layers=2)
    assert (written.args.mtp_num_layers, written.args.mtp_use_repeated_layer) == (2, False)
    plain = strip_mtp(written)
    assert_same(read(plain), model.weights)
    assert plain.description.architecture == model.architecture
    assert plain.args.mtp_num_layers is None


def test_random_layers(tmp_path):
    base = open_checkpoint(write_model(tmp_path / "base", make_model()))
    one, again = (read(add_mtp(base, 1, random_init=RandomInit(5))) for _ in range(2))
    assert_same(one, again)
    other = read(add_mtp(base, 1, random_init=RandomInit(6)))
    projection = "mtp.layers.0.eh_proj.weight"
    assert not torch.equal(one[projection], other[projection])
    assert one[projection].std().item() == pytest.approx(0.02, rel=0.1)
    assert one["mtp.layers.0.hnorm.weight"].unique().tolist() == [1.0]


def test_layers_of_a_module_are_kept_and_more_are_copies_of_them(tmp_path):
    model = make_model(replace(LLAMA, mtp_num_layers=1))
    source = open_checkpoint(write_model(tmp_path / "base", model))
    more = add_mtp(source, 3)
    copies = {
        name.replace("mtp.layers.0.", f"mtp.layers.{layer}."): tensor
        for name, tensor in model.weights.items()
        for layer in range(3 if is_of_mtp(name) else 1)
    }
    assert_same(read(more), copies)
    repeated = add_mtp(source, 3, use_repeated_layer=True)
    assert_same(read(repeated), model.weights)
    assert repeated.description.architecture.mtp_num_layers == 3
    assert_same(read(add_mtp(repeated, 1)), model.weights)


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        (LLAMA, (0,), "--mtp-num-layers 0 is out of range, allowed: 1 or more"),
        (MTP["two layers"], (1,), "--mtp-num-layers 1 is out of range, allowed: 2 or more"),
        (MTP["two layers"], (3, True), "allowed: 2 or more, each with a layer of its own"),
        (ARCHITECTURES["gpt2"], (1,), "position_embedding_type 'learned_absolute' is not possible"),
    ],
)
def test_what_cannot_be_added(tmp_path, architecture, arguments, message):
    source = open_checkpoint(write_model(tmp_path / "base", make_model(architecture)))
    with pytest.raises(ValueError, match=message):
        add_mtp(source, *arguments)


def test_a_model_without_a_module_loses_none(tmp_path):
    source = open_checkpoint(write_model(tmp_path / "base", make_model()))
    with pytest.raises(ValueError, match="has no multi-token-prediction module"):
        strip_mtp(source)


@pytest.mark.parametrize("name", MTP)
def test_exits_come_and_go_beside_it(tmp_path, name):
    model = make_model(MTP[name])
    source = open_checkpoint(write_model(tmp_path / "base", model))
    added = add_exits(source, EXITS)
    assert {n for n in added.weights if is_of_mtp(n)} == {n for n in model.weights if is_of_mtp(n)}
    assert_same(read(strip_exits(added)), model.weights)


def save_tuned(path, model: TinyModel, reference: BaseReference, architecture: Architecture):
    """The checkpoint of a run that has tuned all that its base lacks."""
    description = ModelDescription(architecture, model.early_exit, None, reference)
    tuned = {name: one for name, one in model.weights.items() if reference.lacks(name)}
    write_checkpoint(path, lazy_tensors(tuned), description, described_args(description))
    return tuned


@pytest.mark.parametrize(
    ("name", "base_has_one", "exits"),
    [
        ("two layers", False, (2,)),
        ("two layers", True, ()),
        ("a repeated layer", False, ()),
        ("a repeated layer", True, (2,)),
    ],
)
def test_a_tuned_module_is_merged_with_its_base(tmp_path, name, base_has_one, exits):
    tuned = make_model(MTP[name], exits=exits, use_exit_norm=bool(exits))
    backbone = replace(MTP[name], mtp_num_layers=1 if base_has_one else 0)
    base = {n: t for n, t in make_model(backbone).weights.items() if is_of_mtp(n)}
    base |= {n: t for n, t in tuned.weights.items() if n.startswith(("decoder", "embed", "output"))}
    description = ModelDescription(backbone, EarlyExitConfig(), None)
    write_checkpoint(
        tmp_path / "base", lazy_tensors(base), description, described_args(description)
    )
    reference = BaseReference.of(
        locate(tmp_path / "base"), open_checkpoint(tmp_path / "base").weights, tunes_mtp=True
    )
    stored = save_tuned(tmp_path / "tuned", tuned, reference, tuned.architecture)
    assert any(is_of_mtp(one) for one in stored)
    merged = open_parts(tmp_path / "base", tmp_path / "tuned")
    assert_same(read(merged), tuned.weights)
    assert merged.description.architecture == tuned.architecture
    assert merged.args.mtp_num_layers == tuned.architecture.mtp_num_layers
    merged.write(tmp_path / "merged")
    assert_same(read(open_checkpoint(tmp_path / "merged")), tuned.weights)
    # Without the base's path, too.
    assert_same(read(open_checkpoint(tmp_path / "tuned")), tuned.weights)


def test_a_module_that_was_not_tuned_stays_in_the_base(tmp_path):
    tuned = make_model(MTP["two layers"], exits=(2,), use_exit_norm=True)
    backbone = {name: one for name, one in tuned.weights.items() if not is_of_exit(name)}
    base = TinyModel(tuned.architecture, EarlyExitConfig(), backbone)
    path = write_model(tmp_path / "base", base)
    reference = BaseReference.of(locate(path), open_checkpoint(path).weights)
    # A run that builds no such module describes a model without it.
    stored = save_tuned(tmp_path / "tuned", tuned, reference, LLAMA)
    assert not any(is_of_mtp(one) for one in stored)
    assert not [one for one in open_checkpoint(tmp_path / "tuned").weights if is_of_mtp(one)]
    merged = open_parts(path, tmp_path / "tuned")
    assert_same(read(merged), tuned.weights)
    assert merged.description.architecture == tuned.architecture
    assert merged.args.mtp_num_layers == 2


@pytest.mark.parametrize("tuned_last", ["exits", "module"])
def test_heads_that_were_tuned_one_after_the_other_are_joined(tmp_path, tuned_last):
    """What is tuned second is tuned on the model as it was before the first."""
    whole = make_model(MTP["two layers"], exits=(2,), use_exit_norm=True)
    plain = {n: t for n, t in whole.weights.items() if not is_of_exit(n) and not is_of_mtp(n)}
    models = {
        "plain": TinyModel(LLAMA, EarlyExitConfig(), plain),
        "module": TinyModel(
            whole.architecture,
            EarlyExitConfig(),
            {n: t for n, t in whole.weights.items() if not is_of_exit(n)},
        ),
        "exits": TinyModel(
            LLAMA,
            whole.early_exit,
            {n: t for n, t in whole.weights.items() if not is_of_mtp(n)},
        ),
    }
    path = write_model(tmp_path / "plain", models["plain"])
    reference = BaseReference.of(locate(path), open_checkpoint(path).weights)
    last_model = models[tuned_last]
    save_tuned(tmp_path / "tuned", last_model, reference, last_model.architecture)
    other = "module" if tuned_last == "exits" else "exits"
    base = write_model(tmp_path / "base", models[other])
    merged = open_parts(base, tmp_path / "tuned")
    assert_same(read(merged), whole.weights)
    assert merged.description.early_exit == whole.early_exit
    assert merged.description.architecture == whole.architecture
    merged.write(tmp_path / "merged")
    assert_same(read(open_checkpoint(tmp_path / "merged")), whole.weights)
