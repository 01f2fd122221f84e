"""tools/checkpoint.py: what each verb makes, prints and refuses."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron.early_exit.checkpoint.base import BaseReference, is_of_exit
from megatron.early_exit.checkpoint.description import ModelDescription, read_description
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.checkpoint.stored_rule import described_without_rule, store_rule
from megatron.early_exit.checkpoint.weights import model_weights
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers import saved_checkpoint
from tests.helpers.ee_llm_format import save_ee_llm, with_shared_norms
from tests.helpers.stored_rules import make_rule
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.tiny_models import HEADS, LLAMA, TinyModel, make_model
from tools.checkpoint import main

ROOT = Path(__file__).parents[2]
MODEL = make_model(LLAMA, exits=(1, 3), use_exit_norm=True)


def save(path: Path, model: TinyModel, base: BaseReference | None = None) -> Path:
    """A checkpoint as conversions write it; with a base, of the exits only."""
    weights = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in model.weights.items()
        if base is None or is_of_exit(name)
    }
    description = ModelDescription(model.architecture, model.early_exit, None, base)
    write_checkpoint(path, weights, description, described_args(description))
    return path


def save_base(path: Path) -> Path:
    """MODEL without its exits."""
    backbone = {name: t for name, t in MODEL.weights.items() if not is_of_exit(name)}
    return save(path, TinyModel(LLAMA, make_model(LLAMA).early_exit, backbone))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every kind that the verbs read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    corpus = folder / "corpus.txt"
    words = "quick brown foxes jump over lazy dogs, pack my box with five dozen liquor jugs"
    corpus.write_text("\n".join(f"the {n} {words}" for n in range(99)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=f"{folder}/words", vocab_size=56, minloglevel=2
    )
    base = save_base(folder / "base")
    location = locate(base)
    description = open_checkpoint(base).description
    reference = BaseReference.of(location, model_weights(location, description))
    old = with_shared_norms(make_model(LLAMA, exits=(1, 3), **HEADS["all"]))
    save_ee_llm(old, folder / "ee_llm", tensor=2, pipeline=2)
    bare = saved_checkpoint.save(folder / "bare", 5)
    torch.save({"iteration": 5, "content_metadata": {}}, bare / "common.pt")
    saved_checkpoint.save(folder / "moe", 5, num_experts=8)
    (pieces,) = (save_base(folder / "damaged") / "release").glob("*.distcp")
    pieces.write_bytes(pieces.read_bytes()[:50_000])
    save_base(folder / "unlabelled")
    (folder / "unlabelled" / "early_exit_model.json").write_text('{"format": 3}')
    return {
        "base": base,
        "exits": save(folder / "exits", MODEL, reference),
        "whole": save(folder / "whole", MODEL),
        "ee_llm": folder / "ee_llm",
        "tokenizer": folder / "words.model",
        "bare": folder / "bare",
        "moe": folder / "moe",
        "damaged": folder / "damaged",
        "unlabelled": folder / "unlabelled",
        "FILE/x": folder / "words.model" / "x",
        "none": folder / "none",
    }


def run(*arguments: object) -> int:
    return main([str(one) for one in arguments])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).weights.items()}


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_exits_come_and_go(paths, tmp_path, capsys):
    out = tmp_path / "with"
    flags = ["--exit-layer-nums", "2", "4", "--use-exit-norm", "--use-exit-mlp"]
    assert run("add-exits", paths["base"], out, *flags, "--untie-exit-output-weights") == 0
    text, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    copied = "exits.N.mlp.linear_fc2.weight <- decoder.layers.N.mlp.linear_fc2.weight [32, 48]"
    assert f"2 x {copied}" in lines
    per_exit = 61 * 32 + 32 + (32 + 96 * 32 + 32 * 48)
    heads = "--use-exit-norm --use-exit-mlp --untie-exit-output-weights"
    assert f"exit after layer 4 {per_exit:,} parameters {heads}" in lines
    assert lines[-1].startswith(f"wrote {out}: 37 tensors, 0.2 MB, all read again and equal; next:")
    assert lines[-1].endswith(f"--tune-exit --load {out} ...")
    assert run("strip-exits", out, tmp_path / "plain") == 0
    assert_same(tmp_path / "plain", weights(paths["base"]))
    # One may begin with one iteration, too.
    assert run("strip-exits", out / "release", tmp_path / "again") == 0
    assert run("add-exits", out, tmp_path / "random", *flags, "--random-init", "--seed", 3) == 0
    found = weights(tmp_path / "random")
    assert found["exits.2.norm.weight"].unique().tolist() == [1.0]
    assert "exits.2.projection.weight" not in found


def test_a_mimo_is_imported_and_exported(tmp_path, capsys):
    pytest.importorskip("transformers")
    from tests.helpers.mimo import TinyMiMo

    folder, ours = TinyMiMo().save(tmp_path / "mimo"), tmp_path / "ours"
    assert run("import-hf", folder, ours) == 0
    text = capsys.readouterr().out
    assert "note: Megatron gives the multi-token-prediction module the hidden state behind" in text
    assert "multi-token prediction " in text
    assert inspected(ours, capsys)["architecture"]["mtp_num_layers"] == 1
    assert run("export-hf", ours, tmp_path / "back", "--with-mtp") == 0
    text = capsys.readouterr().out
    assert "left out" not in text
    assert "next: copy configuration_mimo.py and modeling_mimo.py from MiMo-7B's folder" in text
    assert run("export-hf", ours, tmp_path / "plain") == 0
    assert "module is left out (--with-mtp exports it)" in capsys.readouterr().out


def test_a_module_that_predicts_more_tokens_comes_and_goes(paths, tmp_path, capsys):
    out = tmp_path / "with"
    flags = ["--mtp-num-layers", 2, "--mtp-use-repeated-layer"]
    assert run("add-mtp", paths["whole"], out, *flags) == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "1 x mtp.layers.N.eh_proj.weight <- initial value [32, 64]" in lines
    final = "mtp.layers.N.final_layernorm.weight <- decoder.final_layernorm.weight [32]"
    assert f"1 x {final}" in lines
    layer = 2 * 32 + 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48
    assert f"multi-token prediction {layer + 3 * 32 + 64 * 32:,} parameters" in lines
    assert lines[-1].endswith(
        f"--tune-exit --load {out} ... --mtp-num-layers 2 --mtp-use-repeated-layer"
    )
    found = inspected(out, capsys)
    assert found["architecture"] == {
        **LLAMA.to_dict(),
        "mtp_num_layers": 2,
        "mtp_use_repeated_layer": True,
    }
    assert found["parameters"]["multi-token prediction"] == layer + 3 * 32 + 64 * 32
    assert run("inspect", out) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "mtp_num_layers 2, mtp_use_repeated_layer True" in shown
    assert run("strip-exits", out, tmp_path / "plain") == 0
    assert run("strip-mtp", tmp_path / "plain", tmp_path / "none") == 0
    assert_same(tmp_path / "none", weights(paths["base"]))
    assert run("add-mtp", out, tmp_path / "again", *flags, "--random-init") == 2
    assert "--random-init has no effect" in capsys.readouterr().err
    random = ["--mtp-num-layers", 1, "--random-init", "--seed", 3]
    assert run("add-mtp", paths["base"], tmp_path / "random", *random) == 0
    assert weights(tmp_path / "random")["mtp.layers.0.enorm.weight"].unique().tolist() == [1.0]
    pytest.importorskip("transformers")
    capsys.readouterr()
    assert run("export-hf", out, tmp_path / "hf", "--plain") == 0
    assert "note: the multi-token-prediction module is left out" in capsys.readouterr().out
    assert run("export-hf", out, tmp_path / "mimo", "--plain", "--with-mtp") == 2
    assert "mtp_num_layers 2 cannot be expressed in MiMo's format" in capsys.readouterr().err


def test_exits_that_project_with_another_matrix_are_noted(paths, tmp_path, capsys):
    assert run("add-exits", paths["base"], tmp_path / "out", "--exit-layer-nums", 2) == 0
    assert "note: the exits project with the word embedding" in capsys.readouterr().out


def test_exits_that_share_the_final_head_have_no_weights(paths, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--exit-layer-nums", 2, 3, "--share-final-head"]
    assert run("add-exits", paths["base"], out, *flags) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "exit after layer 3 0 parameters --share-final-head" in lines
    assert not [line for line in lines if line.startswith("note: ")]
    assert lines[-1].endswith(
        f"tools/generate.py --load {out} --prompt ... --mode self_speculative"
    )
    assert_same(out, weights(paths["base"]))
    found = inspected(out, capsys)
    assert found["exits"] == {"2": "--share-final-head", "3": "--share-final-head"}
    assert found["early_exit"]["share_final_head"] is True
    assert run("inspect", out) == 0
    assert "exit        after layer 3: --share-final-head" in capsys.readouterr().out
    # Exits of other kinds do not go with them.
    other = ["--exit-layer-nums", 1, "--use-exit-norm"]
    assert run("add-exits", out, tmp_path / "mixed", *other) == 2
    assert "has exits with --share-final-head and the new ones have" in capsys.readouterr().err
    assert run("add-exits", paths["base"], tmp_path / "random", *flags, "--random-init") == 2
    assert "--random-init has no effect with --share-final-head" in capsys.readouterr().err


def test_tuned_exits_are_merged_with_their_base(paths, tmp_path, capsys):
    rule = make_rule("release")
    before = described_without_rule(paths["exits"])
    store_rule(paths["exits"], rule, before)
    assert run("merge-exits", paths["base"], paths["exits"], tmp_path / "merged") == 0
    store_rule(paths["exits"], None, before)
    assert_same(tmp_path / "merged", MODEL.weights)
    # The rule of the exits is that of the same model.
    assert read_description(tmp_path / "merged").rule == rule
    assert "is left out" not in capsys.readouterr().out
    # Other verbs find the base by themselves.
    assert run("strip-exits", paths["exits"], tmp_path / "plain") == 0
    assert_same(tmp_path / "plain", weights(paths["base"]))


def test_ee_llms_checkpoint_generates(paths, tmp_path, capsys):
    arguments = ("--tokenizer-model", paths["tokenizer"])
    assert run("import-ee-llm", paths["ee_llm"], tmp_path / "new", *arguments) == 0
    assert "encoder.layers.N.mlp.trunk.dense_h_to_4h.weight" in capsys.readouterr().out
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "new")
    assert engine.exit_layers == (1, 3)
    assert engine.generate("the quick brown", SamplingParams(max_tokens=5))[0].text


def test_hugging_faces_format_and_back(paths, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert run("export-hf", paths["whole"], tmp_path / "hf", "--plain") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"next: transformers.AutoModelForCausalLM.from_pretrained('{tmp_path}/hf')" in last
    assert run("import-hf", tmp_path / "hf", tmp_path / "back") == 0
    assert f"add-exits {tmp_path}/back DST" in capsys.readouterr().out.splitlines()[-1]
    assert_same(tmp_path / "back", weights(paths["base"]))
    assert run("export-hf", paths["whole"], tmp_path / "own") == 0
    assert "trust_remote_code=True" in capsys.readouterr().out.splitlines()[-1]
    assert run("export-hf", paths["whole"], tmp_path / "draft", "--draft-of-exit", 3) == 0
    assert f"from_pretrained('{tmp_path}/draft')" in capsys.readouterr().out.splitlines()[-1]
    assert run("export-hf", paths["whole"], tmp_path / "none", "--draft-of-exit", 2) == 2
    assert "--draft-of-exit 2: there is no exit after this" in capsys.readouterr().err


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert run("inspect", path, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_is_inspected(paths, tmp_path, capsys):
    found = inspected(paths["whole"], capsys)
    assert found["parameters"] == {
        "embedding": 61 * 32,
        "layers": 4 * (2 * 32 + 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48),
        "final head": 61 * 32 + 32,
        "exit after layer 1": 32,
        "exit after layer 3": 32,
        "model": sum(tensor.numel() for tensor in MODEL.weights.values()),
    }
    assert found["exits"] == {"1": "--use-exit-norm", "3": "--use-exit-norm"}
    assert found["architecture"] == LLAMA.to_dict()
    assert found["layout"] == {"tensor": 1, "pipeline": 1}
    assert (found["dtypes"], found["base"], found["tokenizer"]) == (["float32"], None, None)
    files = (paths["whole"] / "release").iterdir()
    assert found["size_bytes"] == sum(file.stat().st_size for file in files)
    assert run("inspect", paths["whole"]) == 0
    text = capsys.readouterr().out
    assert "exit        after layer 3: --use-exit-norm\n" in text
    assert "written at  tensor 1, pipeline 1\n" in text
    # A run's own: padding, the optimizer's state, another layout.
    args = vars(described_args(ModelDescription(LLAMA, make_model(LLAMA).early_exit, None)))
    state = {"optimizer.state.exp_avg.output_layer.weight": torch.zeros(64, 32)}
    args |= {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 2}
    saved_checkpoint.save(tmp_path, 12, state, **args)
    found = inspected(tmp_path, capsys)
    assert found["parameters"]["optimizer"] == 64 * 32
    assert found["layout"] == {"tensor": 4, "pipeline": 1, "expert": 2}
    assert found["iteration"] == 12


def test_exits_alone_name_their_base(paths, capsys):
    found = inspected(paths["exits"], capsys)
    assert found["base"] == str((paths["base"] / "release").resolve())
    assert found["parameters"] == {"exit after layer 1": 32, "exit after layer 3": 32, "model": 64}
    assert run("inspect", paths["exits"]) == 0
    assert "exits only  the backbone is" in capsys.readouterr().out


def test_a_kind_of_model_that_is_not_known_is_inspected_all_the_same(paths, capsys):
    found = inspected(paths["moe"], capsys)
    assert found["unsupported"] == "--num-experts 8 is not supported by inference"
    assert found["architecture"] is None
    assert found["parameters"]["embedding"] == 16 * 8


NUMS = "--exit-layer-nums"
MTP = "--mtp-num-layers"
REFUSALS = [
    (["add-exits", "base", "OUT", NUMS, "5"], f"{NUMS} 5 is out of range, allowed: 1 to 4"),
    (
        ["add-exits", "base", "OUT", NUMS, "1", "--pre-exit"],
        "allowed: 2 to the number of layers with --pre-exit",
    ),
    (["add-exits", "base", "OUT", NUMS, "2", "2"], f"{NUMS} 2 2: layer 2 is given more than once"),
    (
        ["add-exits", "base", "OUT", NUMS, "2", "--use-exit-mlp", "--pre-exit"],
        "--use-exit-mlp cannot be combined with --pre-exit",
    ),
    (["add-exits", "whole", "OUT", NUMS, "2"], "has exits with --use-exit-norm and the new ones"),
    (["add-exits", "base", "OUT", NUMS, "2", "--seed", "1"], "--seed 1 has no effect without"),
    (["add-exits", "none", "OUT", NUMS, "2"], "none: there is no such directory"),
    (["add-exits", "base", "base", NUMS, "2"], "base exists already, and nothing is written over"),
    (["add-exits", "moe", "OUT", NUMS, "2"], "--num-experts 8 is not supported by inference"),
    (
        ["add-exits", "bare", "OUT", NUMS, "2"],
        "bare/iter_0000005: contains no arguments of its training",
    ),
    (
        ["add-exits", "ee_llm", "OUT", NUMS, "2"],
        "convert it with tools/checkpoint.py import-ee-llm",
    ),
    (["add-exits", "damaged", "OUT", NUMS, "2"], "is missing or damaged"),
    (["add-exits", "unlabelled", "OUT", NUMS, "2"], "format 3 is unknown, allowed: 1 or 2"),
    (["add-exits", "base", "FILE/x", NUMS, "2"], "words.model/x cannot be written"),
    (["strip-exits", "base", "OUT"], "base: the model has no exits"),
    (["strip-mtp", "base", "OUT"], "base: the model has no multi-token-prediction module"),
    (["add-mtp", "base", "OUT", MTP, "0"], "--mtp-num-layers 0 is out of range, allowed: 1 or"),
    (["add-mtp", "base", "OUT", MTP, "1", "--seed", "1"], "--seed 1 has no effect without"),
    (
        ["merge-exits", "base", "whole", "OUT"],
        "whole: holds a whole model, there is nothing to mer",
    ),
    (["merge-exits", "none", "exits", "OUT"], "none: there is no such directory"),
    (["import-ee-llm", "base", "OUT"], "base: is one of the torch_dist format, not EE-LLM's"),
    (["import-ee-llm", "ee_llm", "OUT"], "tokenizer /nowhere/tokenizer.model is not there: give"),
    (
        ["import-ee-llm", "ee_llm", "OUT", "--tokenizer-model", "base"],
        "is not a SentencePiece model",
    ),
    (["import-hf", "base", "OUT"], "base"),
    (["export-hf", "none", "OUT"], "none: there is no such directory"),
    (["quantize", "base", "OUT", "--weight-dtype", "int4"], "--weight-dtype int4 is not served"),
    (["quantize", "none", "OUT"], "none: there is no such directory"),
    (["inspect", "none"], "none: there is no such directory"),
    (["inspect", "bare"], "bare/iter_0000005: contains no arguments of its training"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_what_cannot_be_done_is_one_sentence(paths, tmp_path, capsys, arguments, message):
    known = {name: str(path) for name, path in paths.items()} | {"OUT": str(tmp_path / "out")}
    arguments = [arguments[0], *(known.get(one, one) for one in arguments[1:])]
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "wrote" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["convert"], "invalid choice: 'convert'"),
        (["add-exits", "a", "b"], "the following arguments are required: --exit-layer-nums"),
        (["add-exits", "a", "b", NUMS, "two"], "argument --exit-layer-nums: invalid int value"),
        (["inspect", "a", "--jso"], "unrecognized arguments: --jso"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_another_base_is_refused_and_nothing_is_left(paths, tmp_path, capsys):
    other = save(tmp_path / "other", make_model(LLAMA, seed=1))
    assert run("merge-exits", other, paths["exits"], tmp_path / "out") == 2
    assert "is not the one that the exits were tuned on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGINT, "interrupted: nothing was written"), (signal.SIGTERM, "")],
)
def test_a_signal_leaves_nothing_behind(paths, tmp_path, capsys, monkeypatch, number, message):
    monkeypatch.setattr("tqdm.tqdm.update", lambda *_: os.kill(os.getpid(), number))
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = run("strip-exits", paths["whole"], tmp_path / "out")
    except SystemExit as end:
        status = end.code
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert status == 128 + number
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_a_bar(paths, tmp_path):
    read, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "tools/checkpoint.py", "strip-exits", paths["whole"], tmp_path / "x"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=terminal,
    ) as process:
        assert process.wait(60) == 0
    os.close(terminal)
    shown = b""
    # The end of a terminal is an error.
    with contextlib.suppress(OSError):
        while data := os.read(read, 10_000):
            shown += data
    assert b"100%" in shown
    os.close(read)


def test_what_8_bits_change(tmp_path, capsys):
    path = save_text_checkpoint(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown foxes jump over lazy dogs", encoding="utf-8")
    assert main(["measure-int8", str(path), str(text), "--no-quantize-heads"]) == 0
    assert re.search(
        r"perplexity of \d+ tokens: [\d.]+, in 8 bits [\d.]+ \([+-][\d.]+%\); .* at [\d.]+% of",
        capsys.readouterr().out,
    )
    text.write_bytes(b"\xff\xfe\xfd")
    assert main(["measure-int8", str(path), str(text)]) == 2
    assert f"error: {text}: is no text in UTF-8" in capsys.readouterr().err


def test_quantizing(tmp_path, capsys):
    path = save_text_checkpoint(tmp_path)
    text, out = tmp_path / "text.txt", tmp_path / "small"
    text.write_text("the quick brown foxes jump over lazy dogs. " * 9)
    assert run("measure-int8", path, text) == 0
    measured = capsys.readouterr().out
    assert run("quantize", path, out, "--weight-dtype", "int8", "--text", text) == 0
    printed = capsys.readouterr().out
    assert "decoder.layers.N.mlp.linear_fc1.weight_scale" in printed
    assert f"generate.py --load {out} --prompt" in printed
    assert printed.splitlines()[-1] == measured.strip()
    assert run("inspect", out) == 0
    assert "matrices of layers and of heads in int8" in capsys.readouterr().out
    for verb in (["quantize", out, tmp_path / "again"], ["measure-int8", out, text]):
        assert run(*verb) == 2
        assert "its matrices are in 8 bits, which only inference can use" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
