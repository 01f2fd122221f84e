"""An exit and its layers as a model of transformers, which gives the exit's tokens."""

from dataclasses import replace

import pytest
import torch
import transformers

from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.huggingface import export_hf, open_export
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.huggingface_models import reference_tokens
from tests.helpers.tiny_models import HEADS, LLAMA, make_model
from tests.helpers.written_checkpoint import lazy_tensors

PROMPT = [5, 17, 3, 44, 8, 8, 1]
COUNT = 30
QWEN3 = replace(LLAMA, qk_layernorm=True)
TIED = replace(LLAMA, share_embeddings_and_output_weights=True)


def save(path, architecture, exits=(1, 3), **heads):
    model = make_model(architecture, exits, **heads)
    description = ModelDescription(model.architecture, model.early_exit, None)
    write_checkpoint(path, lazy_tensors(model.weights), description, described_args(description))
    return path


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("architecture", "heads", "position"),
    [
        (LLAMA, {"use_exit_norm": True}, 1),
        (QWEN3, {"use_exit_norm": True, "untie_exit_output_weights": True}, 3),
        (TIED, {"use_exit_norm": True, "use_exit_mlp": True}, 1),
        (TIED, {"use_exit_norm": True, "use_exit_block": True}, 3),
        (LLAMA, HEADS["all"], 1),
        (LLAMA, {"share_final_head": True}, 3),
        (TIED, {"share_final_head": True, "use_exit_gate": True}, 1),
    ],
)
def test_a_draft_gives_the_tokens_of_its_exit(tmp_path, architecture, heads, position):
    ours = save(tmp_path / "ours", architecture, **heads)
    export = export_hf(ours, tmp_path / "draft", draft_of_exit=position)
    assert not export.needs_remote_code
    draft = load(tmp_path / "draft")
    params = SamplingParams(
        max_tokens=COUNT, mode="early_exit", early_exit_threshold=0.0, exit_layers=(position,)
    )
    (expected,) = EarlyExitEngine.from_checkpoint(ours).generate([PROMPT], params)
    assert set(expected.exit_layers) == {position}
    assert reference_tokens(draft, PROMPT, COUNT) == expected.token_ids
    num_layers = position + bool(heads.get("use_exit_block"))
    assert draft.config.num_hidden_layers == num_layers
    assert all(f"layers.{num_layers}." not in name for name in draft.state_dict())


def test_transformers_drafts_with_it(tmp_path):
    # Random layers draft nothing that a random model accepts; an exit behind all of them does.
    ours = save(tmp_path / "ours", LLAMA, exits=(1, 4), share_final_head=True)
    export_hf(ours, tmp_path / "whole", plain=True)
    export_hf(ours, tmp_path / "draft", draft_of_exit=4)
    whole, draft = load(tmp_path / "whole"), load(tmp_path / "draft")
    expected = reference_tokens(whole, PROMPT, COUNT)
    passes, drafts = [], []
    whole.register_forward_hook(lambda *_: passes.append(1))
    draft.register_forward_hook(lambda *_: drafts.append(1))
    draft.generation_config.num_assistant_tokens = 5
    assert reference_tokens(whole, PROMPT, COUNT, assistant_model=draft) == expected
    assert len(drafts) >= COUNT // 2
    assert len(passes) < COUNT // 2
    assert torch.equal(draft.model.embed_tokens.weight, whole.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ({}, {"draft_of_exit": 1}, "--draft-of-exit is not possible: .* without a norm"),
        (
            {"use_exit_norm": True, "exit_vocab_size": 20},
            {"draft_of_exit": 1},
            "have heads for 20 tokens only",
        ),
        (
            {"use_exit_norm": True},
            {"draft_of_exit": 2},
            "--draft-of-exit 2: there is no exit after this layer, allowed: 1, 3",
        ),
        (
            {"use_exit_norm": True},
            {"draft_of_exit": 1, "plain": True},
            "--plain has no effect with --draft-of-exit",
        ),
    ],
)
def test_refusals(tmp_path, heads, options, message):
    ours = save(tmp_path / "ours", LLAMA, **heads)
    with pytest.raises(ValueError, match=message):
        open_export(ours, **options)


def test_a_model_without_exits_has_no_drafts(tmp_path):
    model = make_model(LLAMA, ())
    description = ModelDescription(model.architecture, model.early_exit, None)
    ours = tmp_path / "ours"
    write_checkpoint(ours, lazy_tensors(model.weights), description, described_args(description))
    with pytest.raises(ValueError, match="--draft-of-exit 1: the model has no exits"):
        open_export(ours, draft_of_exit=1)
