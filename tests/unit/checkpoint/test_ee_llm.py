"""Checkpoints of the original EE-LLM become models that compute the same."""

import os
import pickle
import re
from argparse import Namespace
from dataclasses import replace

import pytest
import sentencepiece
import torch

from megatron.early_exit.checkpoint.ee_llm import import_ee_llm
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.ee_llm_format import save_ee_llm, with_shared_norms
from tests.helpers.ee_llm_reference import EeLlmReference
from tests.helpers.tiny_models import ARCHITECTURES, GPT2, HEADS, LLAMA, make_model

# Kinds that EE-LLM has: no norms of queries and keys, no scaled or interleaved RoPE.
MODELS = {
    "llama": LLAMA,
    "all heads of one kind": replace(LLAMA, num_query_groups=4),
    "gpt2": GPT2,
    "partial rope, wide heads": ARCHITECTURES["partial rope, wide heads"],
    "nemotron": replace(ARCHITECTURES["nemotron"], qk_layernorm=False),
}

# EE-LLM's exits know the whole vocabulary, and do not share the final head.
KNOWN_HEADS = [name for name in HEADS if name not in ("few answers", "final head")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """56 pieces, to which EE-LLM adds <CLS> <SEP> <EOD> <MASK> <PAD>: 61."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.txt"
    words = "quick brown foxes jump over lazy dogs, pack my box with five dozen liquor jugs"
    corpus.write_text("\n".join(f"the {n} {words}" for n in range(99)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=f"{folder}/words", vocab_size=56, minloglevel=2
    )
    return folder / "words.model"


def layer_keys(prefix):
    return {
        f"{prefix}input_norm.weight": [128],
        f"{prefix}self_attention.query_key_value.weight": [384, 128],
        f"{prefix}self_attention.dense.weight": [128, 128],
        f"{prefix}post_attention_norm.weight": [128],
    }


def mlp_keys(prefix):
    return {
        f"{prefix}dense_h_to_4h.weight": [640, 128],
        f"{prefix}dense_4h_to_h.weight": [128, 320],
    }


# Of checkpoints that EE-LLM wrote: 8 layers, hidden size 128, MLP size 320, SwiGLU, RMSNorm, RoPE,
# 2053 tokens, --untie-exit-output-weights. Stages are (first layer, layers, projections of exits).
LISTINGS = {
    "std_pp1": ((), {}, [(0, 8, 0)]),
    "main_pp1": ((3, 5), {"pre_exit": True}, [(0, 8, 2)]),
    "main_pp2": ((3, 5), {"pre_exit": True}, [(0, 4, 1), (4, 4, 1)]),
    "norm_pp1": ((3, 5), {"use_exit_norm": True}, [(0, 8, 2)]),
    "tuned_pp1": ((3, 5), {"use_exit_norm": True, "use_exit_mlp": True}, [(0, 8, 2)]),
}


def listed_keys(listing, stage):
    """The keys under model/language_model, and their shapes, that EE-LLM saved."""
    exits, flags, stages = LISTINGS[listing]
    first, count, projections = stages[stage]
    keys = {}
    if first == 0:
        keys["embedding/word_embeddings/weight"] = [2176, 128]
    for place in range(projections):
        keys[f"exit_output_layer/{place}.weight"] = [2176, 128]
    for layer in range(count):
        prefix = f"encoder/layers.{layer}."
        keys |= layer_keys(prefix)
        is_exit = first + layer + 1 in exits
        if is_exit and flags.get("use_exit_norm"):
            keys[f"{prefix}exit_norm.weight"] = [128]
        if is_exit and flags.get("use_exit_mlp"):
            keys |= mlp_keys(f"{prefix}mlp.trunk.") | mlp_keys(f"{prefix}mlp.branch.")
        else:
            keys |= mlp_keys(f"{prefix}mlp.")
    if first + count == 8:
        keys |= {"encoder/final_norm.weight": [128], "output_layer/weight": [2176, 128]}
    return keys


def flat(values, prefix=""):
    if isinstance(values, torch.Tensor):
        return {prefix: list(values.shape)}
    start = f"{prefix}/" if prefix else ""
    return {k: v for key in values for k, v in flat(values[key], f"{start}{key}").items()}


@pytest.mark.parametrize("listing", LISTINGS)
def test_the_helper_writes_what_ee_llm_wrote(tmp_path, listing):
    exits, flags, stages = LISTINGS[listing]
    architecture = replace(
        LLAMA,
        num_layers=8,
        hidden_size=128,
        ffn_hidden_size=320,
        num_query_groups=4,
        kv_channels=32,
        vocab_size=2053,
    )
    untied = {"untie_exit_output_weights": True} if exits else {}
    model = with_shared_norms(make_model(architecture, exits, **untied, **flags))
    folder = save_ee_llm(model, tmp_path, pipeline=len(stages), divisor=128)
    for stage in range(len(stages)):
        name = "mp_rank_00" if len(stages) == 1 else f"mp_rank_00_{stage:03d}"
        state = torch.load(folder / name / "model_optim_rng.pt", weights_only=False)
        assert flat(state["model"]["language_model"]) == listed_keys(listing, stage)
        assert state["args"].padded_vocab_size == 2176


def make(architecture, exits=(), **heads):
    return with_shared_norms(make_model(architecture, exits, **heads))


def check(model, source, tokenizer):
    conversion = import_ee_llm(source, tokenizer)
    assert conversion.description.architecture == model.architecture
    assert conversion.description.early_exit == model.early_exit
    assert conversion.weights.keys() == model.weights.keys()
    for name, lazy in conversion.weights.items():
        assert torch.equal(lazy.read(), model.weights[name]), name
    return conversion


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("heads", KNOWN_HEADS)
def test_every_kind_of_head_at_every_layout(tmp_path, tokenizer, heads, tensor, pipeline):
    model = make(LLAMA, exits=(1, 3), **HEADS[heads])
    save_ee_llm(model, tmp_path, tensor, pipeline)
    check(model, tmp_path, tokenizer)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_backbone(tmp_path, tokenizer, kind):
    model = make(MODELS[kind], exits=(2, 4), **HEADS["all"])
    save_ee_llm(model, tmp_path, tensor=2, pipeline=2)
    check(model, tmp_path, tokenizer)


def test_four_tensor_parallel_ranks(tmp_path, tokenizer):
    model = make(MODELS["all heads of one kind"], exits=(2, 4), **HEADS["all"])
    save_ee_llm(model, tmp_path, tensor=4)
    check(model, tmp_path, tokenizer)


def test_exits_before_layers_and_in_another_order(tmp_path, tokenizer):
    heads = {"use_exit_norm": True, "use_exit_block": True, "untie_exit_output_weights": True}
    model = make(LLAMA, exits=(4, 2, 3), pre_exit=True, exit_layer_weight=(0.1, 0.2, 0.3), **heads)
    assert model.early_exit.positions == (1, 2, 3)
    save_ee_llm(model, tmp_path, pipeline=2)
    check(model, tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("heads", "pre_exit"),
    [
        (heads, pre_exit)
        for heads in KNOWN_HEADS
        for pre_exit in (False, True)
        if not (pre_exit and "use_exit_mlp" in HEADS[heads])
    ],
)
def test_every_head_gives_ee_llms_own_logits(tmp_path, tokenizer, heads, pre_exit):
    model = make(LLAMA, exits=(2, 3), pre_exit=pre_exit, **HEADS[heads])
    path = save_ee_llm(model, tmp_path / "old") / "mp_rank_00" / "model_optim_rng.pt"
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    expected = EeLlmReference(torch.load(path, weights_only=False)).logits(tokens)
    import_ee_llm(tmp_path / "old", tokenizer).write(tmp_path / "new")
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "new")
    for number, logits in expected.items():
        mode = {}
        if number != "final":
            layer = number - 1 if pre_exit else number
            mode = {"mode": "early_exit", "early_exit_threshold": 0.0, "exit_layers": [layer]}
        params = SamplingParams(max_tokens=1, logprobs=0, ignore_eos=True, **mode)
        for end in (1, 5, 8):
            (result,) = engine.generate([tokens[:end].tolist()], params)
            logprobs = torch.log_softmax(logits[end - 1, :61], dim=0)
            assert result.token_ids == [int(logprobs.argmax())]
            assert result.logprobs == pytest.approx([float(logprobs.max())], abs=1e-4)


def test_what_is_written_gives_the_models_text(tmp_path, tokenizer):
    model = make(LLAMA, exits=(1, 3), **HEADS["all"])
    save_ee_llm(model, tmp_path / "old", tensor=2, pipeline=2)
    import_ee_llm(tmp_path / "old", tokenizer).write(tmp_path / "new")
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "new")
    assert engine.eod_id == 58
    params = SamplingParams(
        mode="early_exit", early_exit_threshold=0.4, max_tokens=20, logprobs=0, ignore_eos=True
    )
    reference = EarlyExitEngine(model.segmented)
    prompt = engine.tokenizer.encode("the quick brown")
    (found,), (expected,) = engine.generate([prompt], params), reference.generate([prompt], params)
    assert found.token_ids == expected.token_ids
    assert found.exit_layers == expected.exit_layers
    assert found.logprobs == expected.logprobs
    assert len(set(found.exit_layers)) > 1
    # Tokens that EE-LLM adds to the tokenizer's have no text.
    assert engine.tokenizer.decode([58, *prompt, 60]) == "the quick brown"
    assert engine.generate(["the quick brown"], params)[0].text


def test_weights_for_losses_may_be_those_of_its_own_tool(tmp_path, tokenizer):
    model = make(LLAMA, exits=(1, 3))
    # Its tool adds exits, and leaves the values for their losses as they were.
    given = {"exit_layer_weight": [], "exit_layer_weight_init": [0.5], "exit_layer_temperature": []}
    save_ee_llm(model, tmp_path, **given)
    check(model, tmp_path, tokenizer)


def test_mlps_that_no_exit_uses_are_left_out(tmp_path, tokenizer):
    mlps = make(LLAMA, exits=(2, 3), use_exit_mlp=True)
    # To EE-LLM these are exits after layers 1 and 2, and their MLPs take no part.
    save_ee_llm(mlps, tmp_path, tensor=2, pre_exit=True)
    bare = make_model(LLAMA, exits=(2, 3), pre_exit=True)
    weights = {name: tensor for name, tensor in mlps.weights.items() if name in bare.weights}
    check(replace(bare, weights=weights), tmp_path, tokenizer)


def test_norms_may_have_their_old_name(tmp_path, tokenizer):
    model = make(LLAMA)
    folder = save_ee_llm(model, tmp_path)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    encoder = state["model"]["language_model"]["encoder"]
    for name in list(encoder):
        encoder[name.replace("_norm", "_layernorm")] = encoder.pop(name)
    torch.save(state, path)
    check(model, tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 4}, "--num-experts: such a checkpoint cannot be imported"),
        ({"use_mcore_models": True}, "--use-mcore-models: such a checkpoint cannot be imported"),
        ({"transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine: such"),
        ({"virtual_pipeline_model_parallel_size": 2}, "--num-layers-per-virtual-pipeline-stage"),
        ({"fp32_residual_connection": True}, "--fp32-residual-connection is not supported"),
        ({"hidden_size": None}, "the checkpoint's args do not say hidden_size"),
        ({"hidden_size": 64}, "embedding.word_embeddings.weight has the shape (61, 32), its args"),
        ({"num_layers": 5}, "has no tensor encoder.layers.4.input_norm.weight"),
        ({"num_layers": 3}, "holds encoder.layers.3.input_norm.weight and 5 more tensors, which"),
        ({"exit_layer_nums": [5]}, "--exit-layer-nums 5 is out of range, allowed: 1 to 4"),
        ({"padded_vocab_size": 96}, "61 tokens, which makes 64 rows with padding, and the"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "--tokenizer-type GPT2BPETokenizer is not supp"),
        ({"tensor_model_parallel_size": 2}, "mp_rank_01/model_optim_rng.pt is missing, its args"),
        ({"pipeline_model_parallel_size": 2}, "mp_rank_00_000/model_optim_rng.pt is missing"),
        ({"tensor_model_parallel_size": "2"}, "its args say tensor_model_parallel_size 2, allowed"),
        ({"use_exit_norm": True, "exit_layer_nums": [2]}, "no tensor encoder.layers.1.exit_norm.w"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_args_that_do_not_fit_are_refused(tmp_path, tokenizer, changed, message):
    save_ee_llm(make(LLAMA), tmp_path, **changed)
    with pytest.raises(ValueError, match=re.escape(message)):
        import_ee_llm(tmp_path, tokenizer)


class Foreign:
    """Would run a command, were it unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_files_that_cannot_be_read_are_refused(tmp_path, tokenizer):
    folder = save_ee_llm(make(LLAMA, exits=(1,)), tmp_path / "src", tensor=2)
    path = folder / "mp_rank_01" / "model_optim_rng.pt"
    whole = path.read_bytes()

    def message():
        with pytest.raises(ValueError, match=str(path)) as caught:
            import_ee_llm(tmp_path / "src", tokenizer)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    assert "is truncated, or was not written by torch.save" in message()
    path.write_bytes(pickle.dumps(Foreign(f"touch {tmp_path}/ran")))
    assert "is truncated, or was not written by torch.save" in message()
    torch.save({"args": Namespace(), "model": Foreign(f"touch {tmp_path}/ran")}, path)
    assert "names posix.system, which has no place in a checkpoint" in message()
    torch.save({"args": Namespace(), "weights": {}}, path)
    assert "is not a checkpoint of EE-LLM" in message()
    torch.save([1, 2], path)
    assert "is not a checkpoint of EE-LLM" in message()
    state = {"args": Namespace(), "checkpoint_version": 1.0, "model": {"language_model": {}}}
    torch.save(state, path)
    assert "checkpoint_version 1.0 is not supported, allowed: 3.0" in message()
    torch.save({**state, "checkpoint_version": 3.0}, path)
    assert "lacks embedding.word_embeddings.weight" in message()
    middle = bytearray(whole)
    start = whole.index(b"model_optim_rng/data.pkl") + 200
    middle[start : start + 400] = bytes(400)
    path.write_bytes(bytes(middle))
    assert "is damaged, or holds what cannot be read safely" in message()
    assert not (tmp_path / "ran").exists()
    path.unlink()
    with pytest.raises(ValueError, match=r"mp_rank_01/model_optim_rng.pt is missing"):
        import_ee_llm(tmp_path / "src", tokenizer)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="there is no such directory"):
        import_ee_llm(tmp_path / "none", tokenizer)
    with pytest.raises(ValueError, match=r"holds neither latest_.* nor mp_rank_00/model_optim"):
        import_ee_llm(tmp_path, tokenizer)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("soon")
    with pytest.raises(ValueError, match="says 'soon', not an iteration"):
        import_ee_llm(tmp_path, tokenizer)
    tracker.write_text("7")
    with pytest.raises(ValueError, match=r"names iter_0000007, but iter_0000007/mp_rank_00/"):
        import_ee_llm(tmp_path, tokenizer)
    folder = save_ee_llm(make(LLAMA), tmp_path)
    import_ee_llm(folder, tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer /nowhere/tokenizer.model is not there: give"):
        import_ee_llm(folder)
