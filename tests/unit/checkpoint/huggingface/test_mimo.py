"""MiMo's layer that looks ahead, imported, computed by Megatron, and exported again."""

import json
from dataclasses import replace

import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron.early_exit.checkpoint.base import is_of_mtp  # noqa: E402
from megatron.early_exit.checkpoint.description import read_description  # noqa: E402
from megatron.early_exit.checkpoint.exits import add_exits  # noqa: E402
from megatron.early_exit.checkpoint.huggingface import (  # noqa: E402
    export_hf,
    import_hf,
    open_export,
)
from megatron.early_exit.checkpoint.source import open_checkpoint  # noqa: E402
from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from tests.helpers.exit_models import LAYERS, SEQUENCE, VOCAB, build_model  # noqa: E402
from tests.helpers.huggingface_models import make_hf_reference, save_hf_reference  # noqa: E402
from tests.helpers.mimo import PREFIX, TinyMiMo  # noqa: E402
from tests.helpers.single_process import model_parallel  # noqa: E402
from tests.helpers.tiny_models import LLAMA, MTP, make_model  # noqa: E402
from tests.helpers.written_checkpoint import write_model  # noqa: E402

MEGATRON = {
    "tied": False,
    "num_query_groups": 2,
    "add_qkv_bias": True,
    "ffn_hidden_size": 48,
    "layernorm_epsilon": 1e-6,
    "mtp_num_layers": 1,
}


@pytest.fixture(scope="module")
def mimo():
    return TinyMiMo(vocab_size=VOCAB, num_hidden_layers=LAYERS, rope_parameters={"rope_theta": 1e4})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mimo):
    return mimo.save(tmp_path_factory.mktemp("mimo"))


def test_megatron_computes_what_the_layer_is_defined_to(tmp_path, mimo, folder):
    from megatron.core import dist_checkpointing

    import_hf(folder).write(tmp_path / "ours")
    tokens = torch.randint(VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(0))
    seen = {}
    with model_parallel(), torch.no_grad():
        model = build_model(EarlyExitConfig(), **MEGATRON)
        directory = str(tmp_path / "ours" / "release")
        # Strict about all keys, as Megatron's own loading is.
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, directory)
        model.load_state_dict(loaded["model"])
        model.mtp.register_forward_hook(lambda _, args, output: seen.update(hidden=output))
        positions = torch.arange(SEQUENCE)[None]
        final = model.eval()(tokens[None], positions, None)[0]
        # Of the backbone's rows and then those of the module; the last has no next token.
        ahead = seen["hidden"][SEQUENCE:-1, 0]
        logits, _ = model.output_layer(ahead)
    expected, expected_logits = mimo.look_ahead(tokens.tolist())
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(final, mimo.backbone(tokens[None]).logits[0], **close)
    torch.testing.assert_close(ahead, expected, **close)
    torch.testing.assert_close(logits, expected_logits, **close)


def test_it_is_described_and_has_the_backbone_of_a_qwen2(tmp_path, mimo, folder):
    conversion = import_hf(folder)
    architecture = conversion.description.architecture
    assert (architecture.mtp_num_layers, architecture.mtp_use_repeated_layer) == (1, False)
    assert (architecture.add_qkv_bias, architecture.add_bias_linear) == (True, False)
    plain = import_hf(save_hf_reference(mimo.backbone, tmp_path))
    assert plain.description.architecture == replace(architecture, mtp_num_layers=0)
    own = {name for name in conversion.weights if is_of_mtp(name)}
    assert conversion.weights.keys() - own == plain.weights.keys()
    assert conversion.sources["mtp.layers.0.eh_proj.weight"] == (f"{PREFIX}input_proj.weight",)


def test_it_is_exported_as_it_came(tmp_path, folder):
    import_hf(folder).write(tmp_path / "ours")
    exported = export_hf(tmp_path / "ours", tmp_path / "back", with_mtp=True)
    assert not exported.left_out
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    assert exported.needs_remote_code
    assert not list((tmp_path / "back").glob("*.py"))
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    again = import_hf(tmp_path / "back").description.architecture
    assert again == read_description(tmp_path / "ours").architecture


def test_it_is_left_out_of_other_folders(tmp_path, mimo, folder):
    import_hf(folder).write(tmp_path / "ours")
    exits = EarlyExitConfig(exit_layer_nums=(2,), use_exit_norm=True)
    add_exits(open_checkpoint(tmp_path / "ours"), exits).write(tmp_path / "exits")
    plain = open_export(tmp_path / "ours")
    assert plain.config["architectures"] == ["Qwen2ForCausalLM"]
    assert "num_nextn_predict_layers" not in plain.config
    assert plain.weights.keys() == mimo.backbone.state_dict().keys()
    assert len(plain.left_out) == 11
    assert all(map(is_of_mtp, plain.left_out))
    assert open_export(tmp_path / "exits").left_out == plain.left_out
    assert not [name for name in open_export(tmp_path / "exits").weights if "mtp" in name]
    # An exit and the layers in front of it have no such module at all.
    assert not open_export(tmp_path / "exits", draft_of_exit=2).left_out
    assert open_export(tmp_path / "exits", plain=True, with_mtp=True).weights.keys() == (
        open_export(tmp_path / "ours", with_mtp=True).weights.keys()
    )
    with pytest.raises(ValueError, match="--with-mtp has no effect on a folder with exits"):
        open_export(tmp_path / "exits", with_mtp=True)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (LLAMA, "the model has no multi-token-prediction module, which --with-mtp would write"),
        (MTP["two layers"], "mtp_num_layers 2 cannot be expressed in MiMo's format, allowed: 1"),
        (replace(LLAMA, mtp_num_layers=1), "of a model like LlamaForCausalLM cannot be expressed"),
    ],
)
def test_what_mimos_format_does_not_have(tmp_path, architecture, message):
    write_model(tmp_path / "ours", make_model(architecture))
    with pytest.raises(ValueError, match=message):
        open_export(tmp_path / "ours", with_mtp=True)


def test_what_is_refused(tmp_path, mimo):
    folder = mimo.save(tmp_path, num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="num_nextn_predict_layers 2 is out of range, allowed: 0"):
        import_hf(folder)
    mimo.save(tmp_path, num_nextn_predict_layers=None)
    with pytest.raises(ValueError, match=r"tensor model.mtp_layers.0.* does not belong to a model"):
        import_hf(folder)
    mimo.save(tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    # What a class of its own may store besides.
    tensors[f"{PREFIX}self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, weights)
    import_hf(folder)
    del tensors[f"{PREFIX}input_proj.weight"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=f"tensor {PREFIX}input_proj.weight is missing"):
        import_hf(folder)


def test_a_qwen2_has_no_such_layer(tmp_path):
    folder = save_hf_reference(
        make_hf_reference("Qwen2"), tmp_path, num_nextn_predict_layers=1, attention_bias=True
    )
    assert import_hf(folder).description.architecture.mtp_num_layers == 0
