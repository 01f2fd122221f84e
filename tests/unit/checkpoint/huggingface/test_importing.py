"""Models of Hugging Face's Llama family, imported: the engine computes what transformers does."""

import json
from types import SimpleNamespace

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import read_description
from megatron.early_exit.checkpoint.huggingface import export_hf, import_hf
from megatron.early_exit.checkpoint.huggingface.families import read_architecture
from megatron.early_exit.checkpoint.inspection import inspect
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.huggingface_models import (
    KINDS,
    PROMPT,
    change_config,
    engine_logits,
    make_hf_reference,
    reference_logits,
    reference_tokens,
    save_hf_reference,
    save_tokenizer,
)

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_and_same_greedy_tokens(tmp_path, kind):
    reference = make_hf_reference(kind)
    conversion = import_hf(save_hf_reference(reference, tmp_path / "hf"))
    conversion.write(tmp_path / "ours")
    assert conversion.description.tokenizer is None
    reader = CheckpointReader(locate(tmp_path / "ours").iteration_dir)
    architecture = read_description(tmp_path / "ours").architecture
    assert Architecture.from_args(reader.common_state()["args"]) == architecture

    engine = EarlyExitEngine.from_checkpoint(tmp_path / "ours", max_sequence_length=96)
    # Long enough that the slow frequencies of rotary embeddings tell.
    length = min(reference.config.max_position_embeddings, 800)
    tokens = torch.randint(61, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    difference = engine_logits(engine, tokens) - reference_logits(reference, tokens)
    assert difference.abs().max() < 2e-4
    result = engine.generate([PROMPT], SamplingParams(max_tokens=64))[0]
    assert result.token_ids == reference_tokens(reference, PROMPT, 64)


def test_what_became_of_what(tmp_path):
    conversion = import_hf(save_hf_reference(make_hf_reference("Qwen2"), tmp_path))
    prefix = "model.layers.2.self_attn."
    assert conversion.sources["decoder.layers.2.self_attention.linear_qkv.bias"] == tuple(
        f"{prefix}{name}_proj.bias" for name in "qkv"
    )
    assert conversion.sources.keys() == conversion.weights.keys()


def test_shards_and_the_older_form_of_a_config(tmp_path):
    reference = make_hf_reference("Llama 2", dtype="bfloat16", rope_parameters={"rope_theta": 5e5})
    whole = import_hf(save_hf_reference(reference, tmp_path / "whole"))
    save_hf_reference(
        reference,
        tmp_path / "shards",
        max_shard_size="10KB",
        rope_parameters=None,
        rope_theta=5e5,
        rope_scaling={"type": "linear", "factor": 4},
        head_dim=None,
        num_key_value_heads=None,
        dtype=None,
        torch_dtype="bfloat16",
        tie_word_embeddings=None,
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    shards = import_hf(tmp_path / "shards")
    found = shards.description.architecture
    assert found.rotary_base == 5e5
    assert found.rotary_seq_len_interpolation_factor == 4
    assert found.params_dtype == "bfloat16"
    assert found.kv_channels == 8
    assert shards.weights.keys() == whole.weights.keys()
    for name, tensor in shards.weights.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor.read(), whole.weights[name].read())


def test_a_dtype_that_is_not_told_is_that_of_the_weights(tmp_path):
    reference = make_hf_reference("Llama 2").to(torch.float16)
    found = import_hf(save_hf_reference(reference, tmp_path, dtype=None)).description.architecture
    assert found.params_dtype == "float16"


def test_only_the_wanted_tensors_are_read(tmp_path, monkeypatch):
    import safetensors

    folder = save_hf_reference(make_hf_reference("SmolLM2"), tmp_path)
    read = []

    class Watched:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            self._open = self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def __getattr__(self, name):
            if name == "get_tensor":
                return lambda tensor: read.append(tensor) or self._open.get_tensor(tensor)
            return getattr(self._open, name)

    shards = "megatron.early_exit.checkpoint.huggingface.shards.safe_open"
    monkeypatch.setattr(shards, lambda *args, **more: Watched(safetensors.safe_open(*args, **more)))
    conversion = import_hf(folder)
    assert read == []
    conversion.weights["decoder.layers.1.mlp.linear_fc1.weight"].read()
    mlp = "model.layers.1.mlp."
    assert read == [f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"]


def test_tokenizer(tmp_path):
    folder = save_hf_reference(make_hf_reference("Llama 2"), tmp_path / "hf")
    save_tokenizer(folder, 61)
    import_hf(folder).write(tmp_path / "ours")
    assert read_description(tmp_path / "ours").tokenizer.eod_id == 2
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "ours")
    assert engine.eod_id == 2
    assert engine.generate("w5 w17 w3", SamplingParams(max_tokens=3))[0].prompt_token_ids == [
        5,
        17,
        3,
    ]
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    # Of several ends the tokenizer's own is that of a document.
    found = import_hf(folder).description.tokenizer
    assert (found.eod_id, found.other_end_ids) == (None, (7, 8, 2))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7]}')
    found = import_hf(folder).description.tokenizer
    assert (found.eod_id, found.other_end_ids) == (7, (2,))


def test_all_ends_of_a_text_come_along(tmp_path):
    folder = save_hf_reference(make_hf_reference("Llama 2"), tmp_path / "hf")
    save_tokenizer(folder, 61)
    settings = {"eos_token_id": [7, 8], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    ours, back = tmp_path / "ours", tmp_path / "back"
    import_hf(folder).write(ours)
    engine = EarlyExitEngine.from_checkpoint(ours)
    assert (engine.eod_id, set(engine.other_end_ids)) == (2, {7, 8})
    assert "other_end_ids (7, 8, 2)" in " ".join(" ".join(inspect(ours).lines()).split())
    export_hf(ours, back)
    config, generation = (
        json.loads((back / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert set(config["eos_token_id"]) == set(generation["eos_token_id"]) == {2, 7, 8}
    assert generation["temperature"] == 0.6
    assert set(import_hf(back).description.tokenizer.other_end_ids) == {2, 7, 8}
    # As it was written before descriptions had them; the files know them still.
    path = ours / "early_exit_model.json"
    values = json.loads(path.read_text())
    del values["tokenizer"]["other_end_ids"]
    path.write_text(json.dumps(values))
    assert set(EarlyExitEngine.from_checkpoint(ours).other_end_ids) == {7, 8}
    # Training reads the same folder.
    args = SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(ours / "tokenizer")
    )
    assert set(TokenizerDescription.from_args(args, 2).other_end_ids) == {7, 8}


def test_a_vocabulary_larger_than_the_tokenizers(tmp_path):
    folder = save_hf_reference(make_hf_reference("Llama 2"), tmp_path / "hf")
    save_tokenizer(folder, 50)
    import_hf(folder).write(tmp_path / "ours")
    assert read_description(tmp_path / "ours").architecture.vocab_size == 61
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "ours")
    assert engine.tokenizer.vocab_size == 50
    assert len(engine.generate("w5", SamplingParams(max_tokens=40, ignore_eos=True))) == 1


def test_what_old_files_hold_besides(tmp_path):
    reference = make_hf_reference("SmolLM2")
    folder = save_hf_reference(reference, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "output_layer.weight" not in import_hf(folder).weights
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        import_hf(folder)


def test_the_configs_of_well_known_models():
    """As their makers wrote them, with earlier versions of transformers."""
    llama2 = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    }
    found = read_architecture(llama2, torch.float32)
    assert (found.kv_channels, found.rotary_base, found.params_dtype) == (128, 1e4, "float16")
    assert found.rope_scaling_factor is None
    llama3 = {
        **llama2,
        "attention_bias": False,
        "mlp_bias": False,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    found = read_architecture(llama3, torch.float32)
    assert (found.rope_scaling_factor, found.rotary_base, found.num_query_groups) == (8, 5e5, 8)
    mistral = {
        **llama2,
        "architectures": ["MistralForCausalLM"],
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    }
    assert read_architecture(mistral, torch.float32).rotary_base == 1e6
    with pytest.raises(ValueError, match="sliding_window 4096 is not supported, allowed: null, or"):
        read_architecture({**mistral, "sliding_window": 4096}, torch.float32)
    qwen2 = {
        **llama2,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": False,
        "tie_word_embeddings": True,
    }
    found = read_architecture(qwen2, torch.float32)
    assert (found.add_qkv_bias, found.add_bias_linear, found.kv_channels) == (True, False, 64)
    assert found.share_embeddings_and_output_weights
    qwen3 = {
        **llama2,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_theta": 1000000,
        "sliding_window": None,
    }
    found = read_architecture(qwen3, torch.float32)
    assert (found.qk_layernorm, found.add_qkv_bias, found.kv_channels) == (True, False, 128)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    folder = save_hf_reference(make_hf_reference("SmolLM2"), tmp_path)
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append(name)
        wanted = huggingface_hub.utils.filter_repo_objects(
            (
                *("model-00001-of-00002.safetensors", "consolidated.safetensors", "README.md"),
                *("tokenizer.model", "tokenizer.json", "original/params.json", "model.bin"),
            ),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        assert list(wanted) == [
            "model-00001-of-00002.safetensors",
            "tokenizer.model",
            "tokenizer.json",
        ]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert import_hf("maker/model").weights.keys() == import_hf(folder).weights.keys()
    assert asked == ["maker/model"]


CONFIGS = {
    "another architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        "architecture GPT2LMHeadModel is not supported, allowed: LlamaForCausalLM, Mistral",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, allowed: silu"),
    "one kind of bias": ({"attention_bias": True}, "attention_bias True with mlp_bias False"),
    "rope type": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "rope type 'yarn' is not supported, allowed: default, linear and llama3",
    ),
    "older rope type": (
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope type 'dynamic' is not supported",
    ),
    "llama3 with other frequencies": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        "low_freq_factor 2.0 of the rope type llama3 is not supported, allowed: 1.0",
    ),
    "factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "rope factor 0 is out of range, allowed: numbers above 0",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters differ from layer to layer",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config gptq is not supported",
    ),
    "size": ({"hidden_size": "32"}, "hidden_size '32' is out of range, allowed: 1 or more"),
    "window": ({"sliding_window": "1", "use_sliding_window": True}, "sliding_window '1' is out"),
    "groups": ({"num_key_value_heads": "1"}, "num_key_value_heads '1' is out of range, allowed: 1"),
    "eps": ({"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny' is out of range, allowed: numbers"),
    "quantised oddly": ({"quantization_config": "gptq"}, "quantization_config gptq is not"),
    "no size": ({"num_hidden_layers": None}, "num_hidden_layers None is out of range"),
    "dtype": ({"dtype": "float8"}, "params_dtype 'float8' is unknown, allowed: float32, bfloat16"),
    "one layer less": (
        {"num_hidden_layers": 2},
        "tensor model.layers.2.input_layernorm.weight does not belong to a model like the one in",
    ),
    "one layer more": (
        {"num_hidden_layers": 4},
        "tensor model.layers.3.input_layernorm.weight is missing",
    ),
    "another width": (
        {"intermediate_size": 40},
        r"mlp.gate_proj.weight has the shape \(48, 32\), config.json wants \(40, 32\)",
    ),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(tmp_path, llama_folder, name):
    changed, message = CONFIGS[name]
    folder = copy(llama_folder, tmp_path)
    change_config(folder, **changed)
    with pytest.raises(ValueError, match=f"^{folder}: .*{message}") as caught:
        import_hf(folder)
    assert "\n" not in str(caught.value)


def test_windows_that_are_refused(tmp_path):
    save_hf_reference(make_hf_reference("Mistral"), tmp_path, sliding_window=50)
    with pytest.raises(ValueError, match="sliding_window 50 is not supported, allowed: null, or"):
        import_hf(tmp_path)
    save_hf_reference(
        make_hf_reference("Qwen2"), tmp_path, sliding_window=50, use_sliding_window=True
    )
    change_config(tmp_path, layer_types=None)
    with pytest.raises(ValueError, match="sliding_window 50 is not supported"):
        import_hf(tmp_path)
    change_config(tmp_path, use_sliding_window=False)
    import_hf(tmp_path)


def test_files_that_are_refused(tmp_path, llama_folder):
    folder = copy(llama_folder, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            import_hf(folder)
        assert "\n" not in str(caught.value)

    weights.write_bytes(whole[:-5])
    refused(f"^{weights}: is not a whole safetensors file")
    weights.write_bytes(b"")
    refused(f"^{weights}: is not a whole safetensors file")
    tensors = load_file(llama_folder / "model.safetensors")
    missing = dict(tensors)
    del missing["model.norm.weight"]
    save_file(missing, weights)
    refused("tensor model.norm.weight is missing$")
    save_file({**tensors, "model.layers.1.mlp.router.weight": torch.ones(2)}, weights)
    refused("tensor model.layers.1.mlp.router.weight does not belong to a model like")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.bfloat16)}, weights)
    refused("q_proj.weight, .* differ in dtype, allowed: one for all$")
    name = "model.layers.1.input_layernorm.weight"
    save_file({**tensors, name: tensors[name].to(torch.bfloat16)}, weights)
    refused("layers differ in the dtype of self_attention.linear_qkv.layer_norm_weight")
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, weights)
    refused(f"tensor {name} has a dtype other than F32, BF16, F16")
    weights.unlink()
    refused(f"^{folder}: holds neither model.safetensors nor {INDEX}$")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(r"\(it holds pytorch_model.bin, which is not read\)$")
    (folder / "config.json").write_text("{")
    refused(f"^{folder / 'config.json'} is not a JSON file")
    (folder / "config.json").write_text("[]")
    refused("holds a list, allowed: an object$")


def test_shards_that_are_refused(tmp_path):
    folder = save_hf_reference(make_hf_reference("Llama 2"), tmp_path, max_shard_size="20KB")
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]

    def refused(changed, message):
        (folder / INDEX).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            import_hf(folder)

    refused({"metadata": {}}, "has no weight_map$")
    places = index["weight_map"]
    refused({"weight_map": {**places, "x": "../x.safetensors"}}, "is not the name of a file")
    refused({"weight_map": {**places, "x": shard}}, "has no tensor x, which the index wants$")
    (folder / shard).unlink()
    refused(index, f"^{folder / shard} is missing, and {INDEX} names it$")


def test_sources_that_are_refused(tmp_path):
    for source, message in (
        (tmp_path, "holds no config.json and 0 files .*gguf, allowed: one of these$"),
        (tmp_path / "no" / "such" / "place", "there is no such folder or file, and it is not a"),
        ("nobody/such-a-model", "no such folder or file, and it cannot be had from the hub: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            import_hf(source)
        assert "\n" not in str(caught.value)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.bin is a file, allowed: a folder with config"):
        import_hf(tmp_path / "model.bin")


def write_gguf(path, tensors, kind="llama", scaling=None, window=None):
    """A small Llama without a tokenizer."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(10)
    if scaling is not None:
        writer.add_string(f"{kind}.rope.scaling.type", scaling)
    if window is not None:
        writer.add_sliding_window(window)
    for name, shape in tensors.items():
        writer.add_tensor(name, numpy.ones(shape, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_TENSORS = {
    "token_embd.weight": (10, 8),
    "output_norm.weight": (8,),
    "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8),
    "blk.0.attn_k.weight": (4, 8),
    "blk.0.attn_v.weight": (4, 8),
    "blk.0.attn_output.weight": (8, 8),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.ffn_gate.weight": (12, 8),
    "blk.0.ffn_up.weight": (12, 8),
    "blk.0.ffn_down.weight": (8, 12),
}


def test_gguf_files_that_are_refused(tmp_path):
    """Most of these transformers would read, and compute another model."""
    path = tmp_path / "model.gguf"
    missing = {**GGUF_TENSORS}
    del missing["blk.0.ffn_norm.weight"]
    for message, tensors, options in (
        ("architecture gpt2 is not supported, allowed: llama, mistral", {}, {"kind": "gpt2"}),
        ("scaled rotary frequencies .rope_freqs.weight. are", {"rope_freqs.weight": (2,)}, {}),
        ("rope.scaling.type yarn is not supported", {}, {"scaling": "yarn"}),
        ("sliding_window 32 is not supported, allowed: context_length 64", {}, {"window": 32}),
        ("holds 12 tensors, and transformers reads .* of 11", {"blk.0.attn_q.bias": (8,)}, {}),
        ("holds 10 tensors, and transformers reads .* of 11", missing, {}),
        ("cannot be read by transformers: ", {}, {}),
    ):
        wanted = tensors if tensors is missing else {**GGUF_TENSORS, **tensors}
        write_gguf(path, wanted, **options)
        with pytest.raises(ValueError, match=f"^{path}:? {message}") as caught:
            import_hf(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"GGUF, or not")
    with pytest.raises(ValueError, match=f"^{path} is not a whole GGUF file: "):
        import_hf(path)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return save_hf_reference(make_hf_reference("Llama 2"), tmp_path_factory.mktemp("llama"))


def copy(folder, target):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
