"""Models exported to Hugging Face's format: what was imported comes back bit for bit."""

import json
from inspect import signature

import pytest
import sentencepiece
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from megatron.early_exit.checkpoint.base import BaseReference, is_of_exit
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.exits import add_exits
from megatron.early_exit.checkpoint.huggingface import export_hf, import_hf, open_export
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.huggingface_models import (
    KINDS,
    PROMPT,
    engine_logits,
    make_hf_reference,
    reference_logits,
    reference_tokens,
    save_hf_reference,
    save_tokenizer,
)
from tests.helpers.tiny_models import ARCHITECTURES, make_model
from tests.helpers.written_checkpoint import lazy_tensors

INDEX = "model.safetensors.index.json"
# What decides about the outputs; the class of a Mistral may change to the Llama that it is.
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"),
    *("dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def load_shards(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def import_to(folder, target):
    import_hf(folder).write(target)
    return target


def save_model(path, architecture, tokenizer=None):
    model = make_model(architecture)
    description = ModelDescription(model.architecture, model.early_exit, tokenizer)
    write_checkpoint(path, lazy_tensors(model.weights), description, described_args(description))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_imported_comes_back(tmp_path, kind):
    reference = make_hf_reference(kind, dtype="bfloat16")
    folder = save_hf_reference(reference, tmp_path / "hf")
    save_tokenizer(folder, 61)
    ours = import_to(folder, tmp_path / "ours")
    told = []
    export = export_hf(ours, tmp_path / "back", lambda *one: told.append(one))
    assert not export.needs_remote_code

    original, found = load_shards(folder), load_shards(tmp_path / "back")
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    sizes = [(name, tensor.nbytes) for name, tensor in original.items()]
    assert sorted(told) == sorted(2 * sizes)
    assert sum(size for _, size in told) == 2 * export.num_bytes

    before = transformers.AutoConfig.from_pretrained(folder)
    after = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    for name in FIELDS:
        expected = getattr(before, name, None)
        assert expected is None or getattr(after, name) == expected, name
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(reference_logits(back, PROMPT), reference_logits(again, PROMPT))
    tokenizers = map(transformers.AutoTokenizer.from_pretrained, (folder, tmp_path / "back"))
    encoded, encoded_before = (one("w5 w7").input_ids for one in tokenizers)
    assert encoded == encoded_before
    assert (tmp_path / "back" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    assert import_hf(tmp_path / "back").description.architecture == (
        open_checkpoint(ours).description.architecture
    )


@pytest.mark.parametrize("kind", ["Llama 2", "Qwen2", "Qwen3", "Mistral, odd heads"])
def test_the_class_that_is_chosen(tmp_path, kind):
    reference = make_hf_reference(kind)
    ours = import_to(save_hf_reference(reference, tmp_path / "hf"), tmp_path / "ours")
    assert open_export(ours).config["architectures"] == [type(reference).__name__]


def test_shards(tmp_path):
    folder = save_hf_reference(make_hf_reference("SmolLM2"), tmp_path / "hf")
    ours = import_to(folder, tmp_path / "ours")
    export = export_hf(ours, tmp_path / "back", max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = opened.keys()
            assert len(names) == 1 or sum(export.weights[n].num_bytes for n in names) <= 10_000
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == export.num_bytes
    assert index["weight_map"].keys() == export.weights.keys()
    original = load_shards(folder)
    for name, tensor in load_shards(tmp_path / "back").items():
        assert torch.equal(tensor, original[name])
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(
        reference_logits(back, PROMPT), reference_logits(make_hf_reference("SmolLM2"), PROMPT)
    )


def test_one_tensor_is_read_at_a_time(tmp_path):
    folder = save_hf_reference(make_hf_reference("SmolLM2"), tmp_path / "hf")
    export = open_export(import_to(folder, tmp_path / "ours"))
    order = []
    for name, tensor in export.weights.items():
        read = tensor.read
        object.__setattr__(
            tensor, "read", lambda name=name, read=read: order.append(name) or read()
        )
    export.write(tmp_path / "back", lambda name, _: order.append(name))
    written = order[: 2 * len(export.weights)]
    assert written[::2] == written[1::2] == list(export.weights)


def test_without_a_tokenizer_the_end_of_a_document_is_unknown(tmp_path):
    ours = save_model(tmp_path / "ours", ARCHITECTURES["llama"])
    export = export_hf(ours, tmp_path / "back")
    assert export.tokenizer is None
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    engine = EarlyExitEngine.from_checkpoint(ours)
    result = engine.generate([PROMPT], SamplingParams(max_tokens=40))[0]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert result.token_ids == reference_tokens(back, PROMPT, 40)


def test_plain_leaves_exits_out_and_drafts_with_them_in_transformers(tmp_path):
    """transformers' own early exit: a draft by the first layers, the final norm and the output
    layer, which the whole model verifies."""
    folder = save_hf_reference(make_hf_reference("SmolLM2"), tmp_path / "hf")
    wanted = EarlyExitConfig(exit_layer_nums=(1, 2), use_exit_norm=True, use_exit_gate=True)
    ours = import_to(folder, tmp_path / "ours")
    add_exits(open_checkpoint(ours), wanted).write(tmp_path / "exits")
    with_exits = open_export(tmp_path / "exits")
    assert with_exits.needs_remote_code
    # Nothing there would ask them.
    gates = [f"exits.{layer}.gate.{name}" for layer in (1, 2) for name in ("weight", "bias")]
    assert sorted(with_exits.left_out) == sorted(gates)
    assert not [name for name in (*with_exits.weights, *with_exits.config) if "gate." in name]
    assert "exits.2.norm.weight" in with_exits.weights
    export = export_hf(tmp_path / "exits", tmp_path / "plain", plain=True)
    assert not export.needs_remote_code
    assert not export.left_out
    assert load_shards(tmp_path / "plain").keys() == load_shards(folder).keys()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    check_drafting(plain, reference_tokens(plain, PROMPT, 40))


def check_drafting(model, expected):
    """Drafts by any number of layers do not change the text."""
    draft = signature(AssistedCandidateGenerator.get_candidates).parameters
    for exit_layer in (1, 2):
        if "is_first_iteration" in draft:
            # transformers 5.0 to 5.3 cannot: its own drafts forget this argument.
            with pytest.raises(TypeError, match="is_first_iteration"):
                reference_tokens(model, PROMPT, 40, assistant_early_exit=exit_layer)
        else:
            assert reference_tokens(model, PROMPT, 40, assistant_early_exit=exit_layer) == expected


@pytest.mark.parametrize("kind", ["Llama 2", "SmolLM2"])
def test_a_model_of_layerskip_drafts_with_its_first_layers(tmp_path, kind):
    """Exits that share the final head are what transformers drafts with: the same logits, texts and
    tensors, and no weight is added anywhere. The output layer of one of the models is tied."""
    reference = make_hf_reference(kind)
    folder = save_hf_reference(reference, tmp_path / "hf")
    wanted = EarlyExitConfig(exit_layer_nums=(1, 2), share_final_head=True)
    ours = open_checkpoint(import_to(folder, tmp_path / "ours"))
    added = add_exits(ours, wanted)
    assert added.weights.keys() == ours.weights.keys()
    added.write(tmp_path / "exits")

    engine = EarlyExitEngine.from_checkpoint(tmp_path / "exits")
    with torch.inference_mode():
        hidden = reference(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
        for index, layer in enumerate(wanted.positions):
            expected = reference.lm_head(reference.model.norm(hidden[layer][0]))
            torch.testing.assert_close(
                engine_logits(engine, PROMPT, index), expected, rtol=1e-5, atol=1e-5
            )
    text = reference_tokens(reference, PROMPT, 40)
    for layer in wanted.positions:
        params = SamplingParams(
            max_tokens=40, mode="self_speculative", draft_exit_layer=layer, draft_confidence=0.0
        )
        result = engine.generate([PROMPT], params)[0]
        assert result.token_ids == text
        assert result.statistics.drafts is not None
        assert result.statistics.drafts.drafted > 0

    assert not export_hf(tmp_path / "exits", tmp_path / "back").needs_remote_code
    found, expected = load_shards(tmp_path / "back"), load_shards(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is transformers.LlamaForCausalLM
    check_drafting(back, text)


def test_exits_and_their_base_become_one_folder(tmp_path):
    model = make_model(ARCHITECTURES["llama"], (1, 3), use_exit_norm=True)
    plain = ModelDescription(model.architecture, EarlyExitConfig(), None)
    backbone = {name: one for name, one in model.weights.items() if not is_of_exit(name)}
    write_checkpoint(tmp_path / "base", lazy_tensors(backbone), plain, described_args(plain))
    reference = BaseReference.of(locate(tmp_path / "base"), lazy_tensors(backbone))
    tuned = ModelDescription(model.architecture, model.early_exit, None, reference)
    exits = {name: one for name, one in model.weights.items() if is_of_exit(name)}
    write_checkpoint(tmp_path / "tuned", lazy_tensors(exits), tuned, described_args(tuned))

    assert export_hf(tmp_path / "tuned", tmp_path / "hf").needs_remote_code
    found = load_shards(tmp_path / "hf")
    assert torch.equal(found["exits.3.norm.weight"], model.weights["exits.3.norm.weight"])
    assert torch.equal(found["model.norm.weight"], model.weights["decoder.final_layernorm.weight"])
    export_hf(tmp_path / "tuned", tmp_path / "plain", plain=True)
    assert load_shards(tmp_path / "plain").keys() == found.keys() - {
        "exits.1.norm.weight",
        "exits.3.norm.weight",
    }


TEXT = "def f(x):\n    return  x  # déjà-vu 🥐\n\n\n" * 3 + "\tthe end"
EXACT = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False, "user_defined_symbols": ["\n", "▁▁", "▁▁▁▁"]},
        {"byte_fallback": True, "split_digits": True, "pad_id": 3},
    ],
)
def test_a_sentencepiece_tokenizer_gives_the_same_tokens(tmp_path, options):
    processor = train_sentencepiece(tmp_path, **EXACT, **options)
    ours = save_model(tmp_path / "ours", ARCHITECTURES["llama"], sentencepiece_model(tmp_path, 9))
    export_hf(ours, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, " lead", "a\r\n \u200bß", ""):
        assert tokenizer(text).input_ids == processor.encode(text)
        if "byte_fallback" in options:
            assert tokenizer.decode(processor.encode(text)) == processor.decode(
                processor.encode(text)
            )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    pad = options.get("pad_id")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 9, pad)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 9)


@pytest.mark.parametrize(
    "options", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}]
)
def test_a_sentencepiece_tokenizer_that_has_no_equal(tmp_path, options):
    train_sentencepiece(tmp_path, **{**EXACT, **options})
    ours = save_model(tmp_path / "ours", ARCHITECTURES["llama"], sentencepiece_model(tmp_path, 9))
    export = export_hf(ours, tmp_path / "hf")
    assert export.tokenizer is None
    assert export.config["eos_token_id"] == 9
    assert not list((tmp_path / "hf").glob("tokenizer*"))


def train_sentencepiece(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "the cat and the dog"] * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300 if options.get("byte_fallback") else 40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sentencepiece_model(folder, eod_id):
    path = str(folder / "tokenizer.model")
    return TokenizerDescription(type="SentencePieceTokenizer", model=path, eod_id=eod_id)


REFUSED = {
    "gpt2": "normalization LayerNorm cannot be expressed in Hugging Face's Llama family, allowed:",
    "interleaved partial rope": "rotary_percent 0.5 cannot be expressed",
    "qwen": "--add-qkv-bias with --qk-layernorm cannot be expressed",
    "nemotron": "normalization LayerNorm cannot",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed(tmp_path, name):
    ours = save_model(tmp_path / "ours", ARCHITECTURES[name])
    with pytest.raises(ValueError, match=f"^checkpoint {ours}: {REFUSED[name]}") as caught:
        export_hf(ours, tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_what_is_there_stays(tmp_path):
    ours = save_model(tmp_path / "ours", ARCHITECTURES["llama"])
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        export_hf(ours, tmp_path / "back")
    with pytest.raises(ValueError, match="no such directory"):
        export_hf(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()
