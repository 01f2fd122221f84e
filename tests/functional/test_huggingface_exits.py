"""Exits in transformers: the folder's own class chooses the tokens that our engine chooses."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.huggingface import export_hf
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.huggingface_models import cache_of
from tests.helpers.text_tokenizers import make_tokenizer
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, LLAMA, make_model
from tests.helpers.written_checkpoint import lazy_tensors

PROMPT = [5, 17, 3, 44, 8, 8, 1]
COUNT = 40
ON = {"early_exit_threshold": 0.5}
BACKBONES = {
    "llama": LLAMA,
    "tied, stretched": replace(
        LLAMA, share_embeddings_and_output_weights=True, rotary_seq_len_interpolation_factor=2.0
    ),
    "llama3": ARCHITECTURES["llama3"],
    "qwen": ARCHITECTURES["qwen"],
    "biases": replace(LLAMA, add_bias_linear=True, kv_channels=12, num_query_groups=4),
}


def export(tmp_path, architecture, exits=(1, 3), **heads):
    """The same model as our engine and as one of transformers."""
    model = make_model(architecture, exits, **heads)
    description = ModelDescription(model.architecture, model.early_exit, None)
    ours = tmp_path / "ours"
    write_checkpoint(ours, lazy_tensors(model.weights), description, described_args(description))
    exported = export_hf(ours, tmp_path / "hf")
    assert exported.needs_remote_code
    return EarlyExitEngine.from_checkpoint(ours), load(tmp_path / "hf")


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


def generate(model, prompts=(PROMPT,), **options):
    defaults = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None}
    return model.generate(
        torch.tensor(prompts), return_dict_in_generate=True, **{**defaults, **options}
    )


def compare(engine, model, threshold, exit_layers=None):
    """Returns how many tokens left at each layer."""
    params = SamplingParams(
        max_tokens=COUNT,
        mode="early_exit",
        early_exit_threshold=threshold,
        exit_layers=exit_layers,
    )
    expected = engine.generate([PROMPT], params)[0]
    found = generate(model, early_exit_threshold=threshold, exit_layers=exit_layers)
    assert found.sequences[0, len(PROMPT) :].tolist() == expected.token_ids
    cache = cache_of(found)
    assert cache.exit_layers == expected.exit_layers
    difference = torch.tensor(cache.confidences) - torch.tensor(expected.confidences)
    assert difference.abs().max() < 1e-4
    return {layer: cache.exit_layers.count(layer) for layer in set(cache.exit_layers)}


# Exits that share the final head have no class of their own in transformers.
@pytest.mark.parametrize("heads", [name for name in HEADS if name != "final head"])
def test_every_kind_of_head(tmp_path, heads):
    engine, model = export(tmp_path, LLAMA, **HEADS[heads])
    left = {}
    for threshold in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        for layer, count in compare(engine, model, threshold).items():
            left[layer] = left.get(layer, 0) + count
    assert left.keys() == {1, 3, 4}
    compare(engine, model, 0.4, exit_layers=(3,))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone(tmp_path, backbone):
    engine, model = export(tmp_path, BACKBONES[backbone], **HEADS["all"])
    for threshold in (0.3, 0.6):
        compare(engine, model, threshold)
    full = engine.generate([PROMPT], SamplingParams(max_tokens=COUNT))[0]
    assert generate(model).sequences[0, len(PROMPT) :].tolist() == full.token_ids


def test_an_exit_after_the_last_layer_and_one_before_its_layer(tmp_path):
    engine, model = export(tmp_path / "last", LLAMA, exits=(2, 4), use_exit_norm=True)
    compare(engine, model, 0.4)
    engine, model = export(tmp_path / "pre", LLAMA, exits=(2, 4), pre_exit=True)
    assert model.config.exit_layers == [1, 3]
    compare(engine, model, 0.4)


def test_exits_that_know_a_part_of_the_vocabulary(tmp_path):
    engine, model = export(tmp_path, LLAMA, use_exit_norm=True, exit_vocab_size=20)
    assert compare(engine, model, 0.9).keys() > {1}
    assert generate(model, early_exit_threshold=0.0).sequences[0, len(PROMPT) :].max() < 20


def test_layers_behind_an_exit_wait_until_they_are_needed(tmp_path):
    _, model = export(tmp_path, LLAMA, **HEADS["untied"])
    rows = [0] * len(model.model.layers)

    def count(number):
        def hook(module, given, result):
            rows[number] += result.shape[1]

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(number))
    total = len(PROMPT) + COUNT - 1
    generate(model, early_exit_threshold=0.0)
    assert rows == [total, 0, 0, 0]
    rows[:] = [0] * 4
    exit_layers = cache_of(generate(model, early_exit_threshold=0.8)).exit_layers
    assert set(exit_layers) == {1, 3, 4}
    assert exit_layers[-1] < 4

    def positions_until(layer):
        """All, once, up to the last one that got there; later ones wait."""
        return len(PROMPT) + max(i for i, left_at in enumerate(exit_layers) if left_at >= layer)

    assert rows == [total, positions_until(3), positions_until(3), positions_until(4)]


def test_padding_sampling_and_other_ways_through_generate(tmp_path):
    engine, model = export(tmp_path, LLAMA)
    padded = torch.tensor([[0, 0, *PROMPT], [9, 9, *PROMPT]])
    mask = (torch.arange(9) >= torch.tensor([[2], [0]])).long()
    full = engine.generate([PROMPT, [9, 9, *PROMPT]], SamplingParams(max_tokens=COUNT))
    found = generate(model, padded.tolist(), attention_mask=mask, pad_token_id=0)
    assert found.sequences[:, 9:].tolist() == [one.token_ids for one in full]
    without = model(padded[1:], use_cache=False, labels=padded[1:])
    assert cache_of(without) is None
    logits = without.logits[0].log_softmax(-1)
    expected = -logits[:-1].gather(1, padded[1, 1:, None]).mean()
    assert torch.allclose(without.loss, expected)
    # transformers 5.0 looks prompts up only where there is a token that ends a text.
    unused = min(set(range(model.config.vocab_size)) - set(full[0].token_ids))
    drafted = generate(model, prompt_lookup_num_tokens=3, eos_token_id=unused)
    assert drafted.sequences[0, len(PROMPT) :].tolist() == full[0].token_ids

    assert torch.equal(
        generate(model, early_exit_threshold=0.4, past_key_values=None).sequences,
        generate(model, early_exit_threshold=0.4, exit_layers=iter((1, 3))).sequences,
    )
    # One token is all that top_k 1 can draw, whatever the confidence.
    expected = generate(model, early_exit_threshold=0.4).sequences
    sampled = generate(model, early_exit_threshold=0.4, do_sample=True, top_k=1).sequences
    assert torch.equal(sampled, expected)
    model.config.early_exit_threshold = 0.4
    assert torch.equal(generate(model).sequences, expected)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(generate(again).sequences, expected)


def test_another_measure_than_its_own_is_refused(tmp_path):
    engine, model = export(tmp_path, LLAMA, exit_measure="entropy")
    assert engine.exit_measure == model.config.exit_measure == "entropy"
    generate(model)
    with pytest.raises(ValueError, match=r"'entropy' .* not supported, allowed: 'max_probability'"):
        generate(model, early_exit_threshold=0.5)
    model.config.exit_measure = "max_probability"
    generate(model, early_exit_threshold=0.5)


def test_what_early_exit_refuses(tmp_path):
    _, model = export(tmp_path, LLAMA)
    on = {"early_exit_threshold": 0.5}
    two = [PROMPT, PROMPT]
    for message, prompts, options in (
        ("one sequence at a time, 2 are given", two, on),
        ("without padding only", [PROMPT], {**on, "attention_mask": torch.tensor([[0] + [1] * 6])}),
        ("threshold 1.5 is out of range, allowed: 0 to 1", [PROMPT], {"early_exit_threshold": 1.5}),
        (r"exit_layers 2 is not an exit, allowed: \[1, 3\]", [PROMPT], {**on, "exit_layers": [2]}),
        ("has no effect without early_exit_threshold", [PROMPT], {"exit_layers": [1]}),
        (
            "allowed is one of the two",
            [PROMPT],
            {**on, "past_key_values": transformers.DynamicCache()},
        ),
        ("output_attentions True is not supported", [PROMPT], {"output_attentions": True}),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with exits; no test changes it."""
    return export(tmp_path_factory.mktemp("exported"), LLAMA)[1]


def config_with(**options):
    return {"generation_config": transformers.GenerationConfig(max_new_tokens=COUNT, **options)}


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            "early_exit_threshold '0.5' is not a number, allowed: 0 to 1",
            {"early_exit_threshold": "0.5"},
        ),
        ("early_exit_threshold True is not a number", {"early_exit_threshold": True}),
        ("early_exit_threshold nan is out of range", {"early_exit_threshold": math.nan}),
        ("exit_layers 3 is not a list, allowed: some of", {**ON, "exit_layers": 3}),
        ("exit_layers '13' is not a list", {**ON, "exit_layers": "13"}),
        ("exit_layers '1' is not an exit, allowed:", {**ON, "exit_layers": [3, "1"]}),
        ("use_cache False is not supported by early_exit_threshold", {**ON, "use_cache": False}),
        ("use_cache False is not supported", {**ON, **config_with(use_cache=False)}),
        ("num_beams 3 is not supported by early_exit_threshold", {**ON, "num_beams": 3}),
        (
            "num_return_sequences 2 is not supported by early_exit_threshold, allowed: None, 1",
            {**ON, "num_return_sequences": 2, "do_sample": True},
        ),
        ("prompt_lookup_num_tokens 3 is not", {**ON, "prompt_lookup_num_tokens": 3}),
        ("assistant_model Linear is not", {**ON, "assistant_model": torch.nn.Linear(1, 1)}),
        (
            "guidance_scale 1.5 is not supported by early_exit_threshold",
            {**ON, "guidance_scale": 1.5},
        ),
        ("prefill_chunk_size 4 is not supported by early", {**ON, "prefill_chunk_size": 4}),
        ("cache_implementation 'dynamic' is not", {**ON, "cache_implementation": "dynamic"}),
        (
            "cache_implementation 'static' is not supported by this model, allowed: None, 'dyn",
            {"cache_implementation": "static"},
        ),
        ("cache_implementation 'static' is not", config_with(cache_implementation="static")),
        ("assistant_early_exit 1 is not supported by this model", {"assistant_early_exit": 1}),
        ("output_hidden_states True is not supported", {"output_hidden_states": True}),
        ("StaticCache is not supported by this model", {"static": True}),
        ("not used by the model", {"early_exit_treshold": 0.5}),
    ],
)
def test_options_of_generate_that_are_refused(exported, message, options):
    if options.pop("static", False):
        cache = transformers.StaticCache(config=exported.config, max_cache_len=64)
        options["past_key_values"] = cache
    with pytest.raises(ValueError, match=message):
        generate(exported, **options)


class Listener:
    """A streamer for `generate` that keeps the tokens it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.tokens.append(None)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_options_of_generate_that_work(exported, threshold):
    on = {} if threshold is None else {"early_exit_threshold": threshold}
    expected = generate(exported, **on).sequences
    listener = Listener()
    prompt = torch.tensor([PROMPT])
    for options in (
        {"attention_mask": torch.ones_like(prompt)},
        {"streamer": listener},
        {"max_time": 600.0},
        {"do_sample": True, "top_k": 1},
        {"output_scores": True, "output_logits": True},
        {"generation_config": transformers.GenerationConfig(use_cache=True)},
    ):
        assert torch.equal(generate(exported, **on, **options).sequences, expected), options
    assert listener.tokens == [*expected[0].tolist(), None]
    scored = generate(exported, **on, output_scores=True)
    assert [int(scores.argmax()) for scores in scored.scores] == expected[0, len(PROMPT) :].tolist()
    embedded = exported.generate(
        inputs_embeds=exported.model.embed_tokens(prompt),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
        **on,
    )
    assert torch.equal(embedded[:, -COUNT:], expected[:, len(PROMPT) :])
    if threshold is None:
        without = generate(exported, use_cache=False).sequences
        assert torch.equal(without, expected)
        assert generate(exported, num_beams=2, num_return_sequences=2).sequences.shape[0] == 2
        unused = min(set(range(LLAMA.vocab_size)) - set(expected[0].tolist()))
        drafted = generate(exported, assistant_model=exported, eos_token_id=unused).sequences
        assert torch.equal(drafted, expected)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_stop_strings_end_a_text(exported, tmp_path, threshold):
    make_tokenizer("byte level", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    on = {} if threshold is None else {"early_exit_threshold": threshold}
    whole = generate(exported, **on).sequences[0].tolist()
    place = next(i for i in range(len(PROMPT) + 2, len(whole)) if whole[i] not in whole[:i])
    stop = tokenizer.decode(whole[place])
    found = generate(exported, **on, stop_strings=stop, tokenizer=tokenizer).sequences
    assert found[0].tolist() == whole[: place + 1]


def test_what_generate_hands_on_does_not_reach_the_model(exported):
    """A release of transformers may hand on more than this one does: the tokenizer of stop strings
    is handed on by all."""
    inputs = exported.prepare_inputs_for_generation(
        torch.tensor([PROMPT]), tokenizer=object(), of_a_later_release=1, output_attentions=True
    )
    assert {"input_ids", "output_attentions"} <= inputs.keys()
    assert not {"tokenizer", "of_a_later_release"} & inputs.keys()
