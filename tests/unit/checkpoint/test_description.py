"""What a saved model says about itself."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.architecture import Architecture, UnsupportedArchitecture
from megatron.early_exit.checkpoint.description import (
    ModelDescription,
    read_description,
    write_description,
)
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.reference_decoder import generate
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, LLAMA, make_model, save_checkpoint


def megatron_args(**changes):
    values = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 61,
        "padded_vocab_size": 64,
        "max_position_embeddings": 64,
        "seq_length": 64,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "bias_gelu_fusion": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "untie_embeddings_and_output_weights": True,
        "params_dtype": torch.float32,
        "num_experts": None,
        "multi_latent_attention": False,
        "softmax_type": "vanilla",
        "glu_linear_offset": 0.0,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
    }
    return Namespace(**{**values, **changes})


def test_arguments_give_the_architecture():
    assert Architecture.from_args(megatron_args()) == LLAMA
    assert Architecture.from_args(megatron_args(), vocab_size=60).vocab_size == 60
    assert Architecture.from_args(megatron_args(vocab_size=None)).vocab_size == 64
    alone = Architecture.from_args(megatron_args(group_query_attention=False))
    assert alone.num_query_groups == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"swiglu": False}, ("gelu", False)),
        (
            {"swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": True},
            ("gelu_tanh", False),
        ),
        ({"swiglu": False, "squared_relu": True}, ("squared_relu", False)),
        ({"swiglu": False, "quick_geglu": True}, ("quick_gelu", True)),
        ({}, ("silu", True)),
    ],
)
def test_activations(changes, expected):
    found = Architecture.from_args(megatron_args(**changes))
    assert (found.activation, found.gated_linear_unit) == expected


def test_layers_that_predict_further_tokens():
    plain = Architecture.from_args(megatron_args(mtp_num_layers=None))
    assert (plain.mtp_num_layers, plain.mtp_stored_layers) == (0, 0)
    two = Architecture.from_args(megatron_args(mtp_num_layers=2))
    assert (two.mtp_num_layers, two.mtp_stored_layers) == (2, 2)
    repeated = Architecture.from_args(megatron_args(mtp_num_layers=2, mtp_use_repeated_layer=True))
    assert (repeated.mtp_num_layers, repeated.mtp_stored_layers) == (2, 1)


def test_rope_scaling_needs_its_switch():
    assert Architecture.from_args(megatron_args()).rope_scaling_factor is None
    scaled = Architecture.from_args(megatron_args(use_rope_scaling=True))
    assert scaled.rope_scaling_factor == 8.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "--num-experts 8 is not supported by inference"),
        ({"multi_latent_attention": True}, "--multi-latent-attention is not supported"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
        ({"window_size": (128, 0)}, "--window-size"),
    ],
)
def test_what_cannot_be_computed_is_named(changes, message):
    args = megatron_args(**changes)
    with pytest.raises(UnsupportedArchitecture, match=message):
        Architecture.from_args(args)
    assert ModelDescription.from_args(args, EarlyExitConfig()).architecture is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers 0 is out of range, allowed: 1 or more"),
        ({"num_query_groups": 3}, "divisors of num_attention_heads, 4"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown, allowed: gelu, "),
        ({"mtp_num_layers": -1}, "mtp_num_layers -1 is out of range, allowed: 0 or more"),
        (
            {"mtp_num_layers": 1, "position_embedding_type": "learned_absolute"},
            "'learned_absolute' is not possible with mtp_num_layers, allowed: rope, none",
        ),
    ],
)
def test_fields_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**{**LLAMA.to_dict(), **changes})


def describe(model, tokenizer=None):
    return ModelDescription(model.architecture, model.early_exit, tokenizer)


def tokenizer_in(folder: Path) -> TokenizerDescription:
    path = folder / "spm.model"
    path.write_bytes(b"pieces")
    return TokenizerDescription("SentencePieceTokenizer", str(path), eod_id=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_description_comes_back(tmp_path, architecture):
    model = make_model(architecture, exits=(1, 3), **HEADS["all"])
    save_checkpoint(model, tmp_path)
    write_description(tmp_path, describe(model))
    assert read_description(tmp_path) == describe(model)


def test_the_measure_of_confidence_is_stored(tmp_path):
    model = make_model(exits=(1, 3), exit_measure="entropy")
    save_checkpoint(model, tmp_path)
    write_description(tmp_path, describe(model))
    assert read_description(tmp_path).early_exit.exit_measure == "entropy"
    assert EarlyExitEngine.from_checkpoint(tmp_path).exit_measure == "entropy"
    # Models that were saved before there were several.
    path = tmp_path / "early_exit_model.json"
    values = json.loads(path.read_text())
    del values["early_exit"]["exit_measure"]
    path.write_text(json.dumps(values))
    assert read_description(tmp_path).early_exit.exit_measure == "max_probability"


def test_the_tokenizer_travels(tmp_path):
    model, save_dir = make_model(), tmp_path / "save"
    tokenizer = tokenizer_in(tmp_path)
    for _ in range(2):
        write_description(save_dir, describe(model, tokenizer))
    assert (save_dir / "tokenizer" / "spm.model").read_bytes() == b"pieces"
    (tmp_path / "spm.model").write_bytes(b"others")
    write_description(save_dir, describe(model, tokenizer))
    assert (save_dir / "tokenizer" / "spm.model").read_bytes() == b"others"
    save_checkpoint(model, save_dir)
    found = read_description(save_dir).tokenizer
    assert found == TokenizerDescription("SentencePieceTokenizer", "spm.model", eod_id=2)
    names = sorted(path.name for path in save_dir.iterdir())
    assert names == [
        "early_exit_model.json",
        "iter_0000007",
        "latest_checkpointed_iteration.txt",
        "tokenizer",
    ]


def test_a_run_may_use_its_own_copy_of_the_tokenizer(tmp_path):
    model, save_dir = make_model(), tmp_path / "save"
    write_description(save_dir, describe(model, tokenizer_in(tmp_path)))
    copy = TokenizerDescription(
        "SentencePieceTokenizer", str(save_dir / "tokenizer" / "spm.model"), eod_id=2
    )
    write_description(save_dir, describe(model, copy))
    assert (save_dir / "tokenizer" / "spm.model").read_bytes() == b"pieces"


def test_a_missing_tokenizer_is_an_error(tmp_path):
    absent = TokenizerDescription("SentencePieceTokenizer", str(tmp_path / "absent.model"))
    with pytest.raises(ValueError, match=r"--tokenizer-model .*absent.model: there is no such"):
        write_description(tmp_path / "save", describe(make_model(), absent))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "model description .*early_exit_model.json"),
        ("[]", "early_exit_model.json"),
        ('{"format": 99}', "format 99 is unknown, allowed: 1 or 2"),
        ('{"format": 1}', "does not fit this version"),
    ],
)
def test_a_damaged_description_is_an_error(tmp_path, text, message):
    save_checkpoint(make_model(), tmp_path)
    (tmp_path / "early_exit_model.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_description(tmp_path)


def test_a_plain_checkpoint_describes_itself_by_its_arguments(tmp_path):
    model = make_model(exits=(1, 3), use_exit_norm=True)
    directory = save_checkpoint(model, tmp_path)
    args = megatron_args(exit_layer_nums=[1, 3], use_exit_norm=True, null_tokenizer_eod_id=4)
    torch.save({"args": args}, directory / "common.pt")
    found = read_description(directory)
    assert found.architecture == LLAMA
    assert found.early_exit == model.early_exit
    engine = EarlyExitEngine.from_checkpoint(directory)
    assert (engine.exit_layers, engine.eod_id) == ((1, 3), 4)


def test_a_model_that_cannot_be_computed_says_why_when_it_is_loaded(tmp_path):
    directory = save_checkpoint(make_model(), tmp_path)
    args = megatron_args(num_experts=8)
    torch.save({"args": args}, directory / "common.pt")
    write_description(tmp_path, ModelDescription.from_args(args, EarlyExitConfig()))
    assert json.loads((tmp_path / "early_exit_model.json").read_text())["architecture"] is None
    with pytest.raises(UnsupportedArchitecture, match="--num-experts 8"):
        EarlyExitEngine.from_checkpoint(tmp_path)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_an_engine_from_a_checkpoint_gives_the_oracles_tokens(tmp_path, heads):
    model = make_model(exits=(1, 4), **heads)
    save_checkpoint(model, tmp_path)
    write_description(tmp_path, describe(model))
    engine = EarlyExitEngine.from_checkpoint(tmp_path, dtype=torch.float32, device="cpu")
    params = SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=0.7)
    result = engine.generate([[5, 17, 3]], params)[0]
    assert result.token_ids == [t.token_id for t in generate(model, [5, 17, 3], 8, 0.7)]
