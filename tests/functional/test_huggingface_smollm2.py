"""SmolLM2-135M, imported, exported and with exits: a real model with a real tokenizer."""

import pytest
import torch
import transformers
from safetensors import safe_open

from megatron.early_exit.checkpoint.exits import add_exits
from megatron.early_exit.checkpoint.huggingface import export_hf, import_hf
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.huggingface_models import (
    cache_of,
    engine_logits,
    reference_logits,
    reference_tokens,
)
from tests.helpers.smollm2 import PACKAGE, find_gguf
from tests.helpers.spawn import spawn

GGUF = find_gguf()
PROMPT = "The three largest cities of France are"
COUNT = 64
COUNT_DIVIDED = 16
"""What several processes on two cores give in a moment."""

pytestmark = pytest.mark.skipif(GGUF is None, reason=f"{PACKAGE} is not installed: make setup")


@pytest.fixture(scope="session")
def reference():
    """The model as transformers itself reads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "imported"
    import_hf(GGUF).write(target)
    return target


@pytest.fixture(scope="session")
def engine(imported):
    return EarlyExitEngine.from_checkpoint(imported, max_sequence_length=256)


@pytest.fixture(scope="session")
def references_tokens(reference, engine):
    return reference_tokens(reference, engine.tokenizer.encode(PROMPT), COUNT)


def test_same_logits_and_same_text(reference, references_tokens, engine):
    text = "Liberté, égalité, fraternité: 1789 was the year\n\n  of the French Revolution. 🥐"
    tokens = engine.tokenizer.encode(text)
    original = transformers.AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    assert tokens == original(text).input_ids
    assert engine.tokenizer.decode(tokens) == text
    difference = engine_logits(engine, tokens) - reference_logits(reference, tokens)
    assert difference.abs().max() < 2e-4
    result = engine.generate(PROMPT, SamplingParams(max_tokens=COUNT, ignore_eos=True))[0]
    assert result.token_ids == references_tokens
    assert "Paris" in result.text


def generate_divided(folder, layout):
    """The tokens on one of several ranks."""
    engine = EarlyExitEngine.from_checkpoint(folder, max_sequence_length=256, **layout)
    (result,) = engine.generate(PROMPT, SamplingParams(max_tokens=COUNT_DIVIDED, ignore_eos=True))
    engine.close()
    return result.token_ids


# Nine heads in three groups: two tensor-parallel ranks cannot share them, three can.
@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, {"tensor_parallel": 3}], ids=str)
def test_several_processes_give_the_same_text(references_tokens, imported, layout):
    (count,) = layout.values()
    found = spawn(generate_divided, count, str(imported), layout)
    assert found == [references_tokens[:COUNT_DIVIDED]] * count


def test_the_export_is_the_model(reference, imported, tmp_path):
    export_hf(imported, tmp_path / "back", max_shard_bytes=200 * 10**6)
    expected = reference.state_dict()
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) == 3
    found = set()
    for file in files:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, it is no dictionary
                assert torch.equal(shard.get_tensor(name), expected[name]), name
                found.add(name)
    assert found == expected.keys() - {"lm_head.weight"}
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (tokenizer.eos_token_id, back.generation_config.eos_token_id) == (2, 2)
    assert tokenizer.chat_template is not None
    prompt = tokenizer(PROMPT).input_ids
    assert torch.equal(reference_logits(back, prompt), reference_logits(reference, prompt))
    drafted = reference_tokens(back, prompt, 16, assistant_early_exit=24)
    assert drafted == reference_tokens(back, prompt, 16)


def test_exits_choose_the_same_tokens_in_transformers(imported, tmp_path):
    wanted = EarlyExitConfig(exit_layer_nums=(24, 29), use_exit_norm=True, use_exit_mlp=True)
    add_exits(open_checkpoint(imported), wanted).write(tmp_path / "exits")
    export_hf(tmp_path / "exits", tmp_path / "hf")
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "exits", max_sequence_length=256)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    params = SamplingParams(
        max_tokens=COUNT, mode="early_exit", early_exit_threshold=0.7, ignore_eos=True
    )
    expected = engine.generate(PROMPT, params)[0]
    found = model.generate(
        **tokenizer(PROMPT, return_tensors="pt"),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
        early_exit_threshold=0.7,
        return_dict_in_generate=True,
    )
    assert found.sequences[0, -COUNT:].tolist() == expected.token_ids
    assert cache_of(found).exit_layers == expected.exit_layers
    assert set(expected.exit_layers) == {24, 29, 30}
