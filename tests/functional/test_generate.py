"""tools/generate.py from the command line to JSON lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.compiler import needs_compiler
from tests.helpers.speed import patient
from tests.helpers.tiny_models import LLAMA, make_model, save_checkpoint
from tools.generate import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with exits after layers 1 and 3 and a tokenizer of its 61 tokens."""
    folder = tmp_path_factory.mktemp("generate")
    corpus = folder / "corpus.txt"
    words = "quick brown foxes jump over lazy dogs, pack my box with five dozen liquor jugs"
    corpus.write_text("\n".join(f"the {n} {words}" for n in range(99)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=f"{folder}/words", vocab_size=61, minloglevel=2
    )
    model = make_model(exits=(1, 3), use_exit_norm=True)
    save_checkpoint(model, folder / "model")
    args = SimpleNamespace(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=f"{folder}/words.model"
    )
    tokenizer = TokenizerDescription.from_args(args, 2)
    write_description(folder / "model", ModelDescription(LLAMA, model.early_exit, tokenizer))
    return folder / "model"


@pytest.mark.parametrize("kv_policy", ["exact", "propagate"])
def test_one_prompt_gives_its_text(checkpoint, capsys, kv_policy):
    flags = ["--mode", "early_exit", "--early-exit-threshold", "0.5", "--max-tokens", "9"]
    flags += ["--kv-policy", kv_policy] if kv_policy != "exact" else []
    assert main(["--load", str(checkpoint), "--prompt", "the quick", *flags]) == 0
    out, err = capsys.readouterr()
    engine = EarlyExitEngine.from_checkpoint(checkpoint)
    params = SamplingParams(
        mode="early_exit", early_exit_threshold=0.5, max_tokens=9, kv_policy=kv_policy
    )
    (result,) = engine.generate("the quick", params)
    assert out == result.text + "\n"
    assert f"layer 1: {result.exit_layers.count(1)} tokens" in err
    assert "\x1b" not in out


def test_measure_and_thresholds_are_fields_of_the_request(checkpoint, capsys):
    flags = ["--mode", "early_exit", "--exit-measure", "margin", "--exit-thresholds", "0.2", "0.1"]
    flags += ["--exit-threshold-decay", "4", "--max-tokens", "9"]
    assert main(["--load", str(checkpoint), "--prompt", "the quick", *flags]) == 0
    out, err = capsys.readouterr()
    params = SamplingParams(
        mode="early_exit",
        exit_measure="margin",
        exit_thresholds=(0.2, 0.1),
        exit_threshold_decay=4.0,
        max_tokens=9,
    )
    (result,) = EarlyExitEngine.from_checkpoint(checkpoint).generate("the quick", params)
    assert out == result.text + "\n"
    assert f"layer 1: {result.exit_layers.count(1)} tokens" in err
    wrong = ["--mode", "early_exit", "--exit-thresholds", "0.5", "0.5", "2"]
    assert main(["--load", str(checkpoint), "--prompt", "the quick", *wrong]) == 2
    assert "--exit-thresholds (0.5, 0.5, 2.0) is out of range" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_processes_print_the_text_once(checkpoint, capsys, kind):
    flags = ["--load", str(checkpoint), "--prompt", "the quick", "--max-tokens", "9"]
    assert main(flags) == 0
    expected = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    layout = [f"--{kind}-model-parallel-size", "2", "--device", "cpu"]
    done = subprocess.run(
        [*torchrun, "--standalone", "tools/generate.py", *flags, *layout],
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == expected


@needs_compiler
def test_compiled_layers_give_the_same_text(checkpoint, capsys):
    flags = ["--load", str(checkpoint), "--prompt", "the quick", "--max-tokens", "9"]
    assert main(flags) == 0
    expected = capsys.readouterr().out
    assert main([*flags, "--compile"]) == 0
    assert capsys.readouterr().out == expected


def test_a_file_of_prompts_gives_a_file_of_results(checkpoint, tmp_path):
    texts = ["the quick", "foxes", "", "x " * 200, "lazy dogs jump"]
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = ["--max-tokens", "6", "--logprobs", "2", "--temperature", "1", "--seed", "4"]
    files = ["--prompts-file", str(prompts), "--output", str(output)]
    # Two of the prompts cannot be served; the others are.
    assert main(["--load", str(checkpoint), *files, *flags]) == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == texts
    assert "a prompt is empty" in lines[2]["error"]
    assert "is too long, allowed: up to 63" in lines[3]["error"]
    engine = EarlyExitEngine.from_checkpoint(checkpoint)
    params = SamplingParams(max_tokens=6, logprobs=2, temperature=1, seed=4)
    for index in (0, 1, 4):
        (result,) = engine.generate(texts[index], params)
        line = lines[index]
        assert (line["text"], line["token_ids"]) == (result.text, result.token_ids)
        assert line["logprobs"] == pytest.approx(result.logprobs, abs=1e-4)
        assert line["exit_layers"] == result.exit_layers
        assert [len(top) for top in line["top_logprobs"]] == [2] * len(line["token_ids"])
        assert line["error"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--top-p", "2"], "--top-p 2.0 is out of range, allowed: above 0"),
        (["--prompt", "a", "--exit-layers", "1"], "--exit-layers (1,) has no effect with"),
        (
            ["--prompt", "a", "--mode", "early_exit", "--exit-layers", "2"],
            "exit_layers 2 is unknown, allowed: 1, 3",
        ),
        (["--prompts-file", "/no/such"], "--prompts-file /no/such cannot be read"),
        (["--prompt", "a", "--max-batch-size", "0"], "max_batch_size 0 is out of range"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(checkpoint, capsys, flags, message):
    assert main(["--load", str(checkpoint), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"prompt": 3}'])
def test_a_malformed_line_is_named(checkpoint, capsys, tmp_path, line):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert main(["--load", str(checkpoint), "--prompts-file", str(prompts)]) == 2
    assert f"--prompts-file {prompts}, line 2: expected" in capsys.readouterr().err
