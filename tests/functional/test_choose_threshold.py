"""The command that chooses a rule, what uses the rule afterwards, and its documentation."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest

from megatron.early_exit.checkpoint.description import read_description
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.stored_rule import described_without_rule, store_rule
from megatron.early_exit.evaluation.choosing import needed
from megatron.early_exit.server.command_line import said_of_exits, settings_of
from tests.helpers.stored_rules import make_rule
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import NAME, text_server
from tools.choose_threshold import build_parser, main, report
from tools.generate import main as generate
from tools.run_early_exit_text_generation_server import build_parser as server_parser

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "choose.md"
WORDS = [
    "the",
    "quick",
    "brown",
    "foxes",
    "jump",
    "over",
    "lazy",
    "dogs",
    "pack",
    "my",
    "box",
    "with",
    "five",
    "dozen",
    "jugs",
]
RULE = make_rule()
RULES = "--kv-policies exact --thresholds 0.5 0.03 0 --rank-by depth --exit-layers 3"
SEVERAL = f"{RULES} 1+3 --fitting-texts 0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "held_out.jsonl"
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=4)) for _ in range(40)]
    # One that comes again is the same text, not another one.
    lines = [{"prompt": one, "reference": " fox"} for one in (*prompts, prompts[0])]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(checkpoint: Path, folder: Path, texts: Path, words: str) -> int:
    flags = f"--load {checkpoint} --output-dir {folder} --tasks {texts} --no-compile {words}"
    return main([*flags.split(), "--max-tokens", "4", "--timed-texts", "2"])


def test_a_rule_is_found_stored_used_shown_and_taken_out(checkpoint, texts, tmp_path, capsys):
    words = f"--agreement 0.5 --confidence 0.8 {SEVERAL}"
    before = described_without_rule(checkpoint)
    assert run(checkpoint, tmp_path, texts, f"{words} --dry-run") == 0
    shown = capsys.readouterr().out
    assert "1 texts are left out" in shown
    assert "Chosen: mode early_exit, threshold 0.5 of max_probability" in shown
    assert "Promise: 50 % agreement with the full model on texts like those of held_out" in shown
    assert read_description(checkpoint).rule is None
    records = (tmp_path / "records.jsonl").read_text()
    assert run(checkpoint, tmp_path, texts, words) == 0
    # Nothing was measured again.
    assert (tmp_path / "records.jsonl").read_text() == records
    rule = read_description(checkpoint).rule
    assert rule is not None
    assert (rule.early_exit_threshold, rule.iteration) == (0.5, "iter_0000007")
    assert (rule.promise.texts, rule.promise.agreement, rule.promise.dtype) == (40, 0.5, "fp32")
    assert described_without_rule(checkpoint) == before
    choice = json.loads((tmp_path / "choice.json").read_text())
    proven = [one for one in choice["tested"] if one["is_proven"]]
    assert proven
    assert all(one["p_value"] <= choice["level"] == pytest.approx(0.1) for one in proven)
    assert all(one["p_value"] > 0.1 for one in choice["tested"] if not one["is_proven"])
    depths = {tuple(g["rule"]["exit_layers"]): g["mean_exit_layer"] for g in choice["gains"]}
    assert rule.promise.mean_exit_layer == min(depths.values()) == depths[rule.exit_layers]
    assert run(checkpoint, tmp_path, texts, words.replace("0.5 ", "0.4 ", 1)) == 2
    assert "measured for --agreement 0.5 --confidence 0.8: a promise" in capsys.readouterr().err
    # A rule that leaves at once shows that generate.py uses what is stored.
    at_once = make_rule(rule.iteration, early_exit_threshold=0.0)
    store_rule(checkpoint, at_once, before)
    output = tmp_path / "answers.jsonl"
    asks = f"--load {checkpoint} --prompt quick --output {output}".split()
    assert generate(asks) == 0
    assert set(json.loads(output.read_text())["exit_layers"]) == {1}
    assert generate([*asks, "--mode", "full"]) == 0
    assert 1 not in json.loads(output.read_text())["exit_layers"]
    capsys.readouterr()
    assert main(["--load", str(checkpoint), "--clear", "--dry-run"]) == 0
    assert f"Would be taken out: {at_once.sentence()}" in capsys.readouterr().out
    assert read_description(checkpoint).rule == at_once
    assert main(["--load", str(checkpoint), "--clear"]) == 0
    assert f"Taken out: {at_once.sentence()}" in capsys.readouterr().out
    assert read_description(checkpoint).rule is None
    assert described_without_rule(checkpoint) == before


def test_thresholds_of_single_exits_are_fitted_to_other_texts_and_stored(
    checkpoint, texts, tmp_path, capsys
):
    words = "--agreement 0.4 --confidence 0.8 --kv-policies exact --exit-layers 1+3"
    words += " --thresholds 1 0.7 0.4 --rank-by depth"
    before = described_without_rule(checkpoint)
    assert run(checkpoint, tmp_path, texts, words) == 0
    shown = capsys.readouterr().out
    assert "thresholds of single exits are fitted to 10 texts, which prove nothing" in shown
    assert "max_probability, exact, exits 1+3, a threshold for each exit" in shown
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["level"] == pytest.approx(0.2 / 2)
    fitted = [one["rule"] for one in choice["tested"] if one["rule"]["exit_thresholds"]]
    # The exits of these random weights never agree, so they have to be quite sure.
    assert [one["exit_thresholds"] for one in fitted] == [[1.0, 1.0]]
    stored = read_description(checkpoint).rule
    assert stored is not None
    assert stored.promise.texts == 30
    rule = make_rule(
        stored.iteration,
        early_exit_threshold=None,
        exit_thresholds=(0.0, 1.0),
        exit_layers=(1, 3),
    )
    store_rule(checkpoint, rule, before)
    output = tmp_path / "answers.jsonl"
    asks = f"--load {checkpoint} --prompt quick --output {output}".split()
    try:
        assert generate(asks) == 0
        assert set(json.loads(output.read_text())["exit_layers"]) == {1}
        # One threshold for all exits comes before the stored ones.
        assert generate([*asks, "--mode", "early_exit", "--early-exit-threshold", "1"]) == 0
        assert 1 not in json.loads(output.read_text())["exit_layers"]
        args = server_parser().parse_args(["--load", str(checkpoint)])
        exits = settings_of(args, (1, 3), rule=rule).exits
        with text_server(checkpoint, exits=exits) as server:
            (card, *_) = server.get("/v1/models").json()["data"]
            body = {"model": NAME, "prompt": "quick", "max_tokens": 4}
            metrics = server.post("/v1/completions", body).json()["metrics"]
    finally:
        store_rule(checkpoint, None, before)
    assert card["exit_thresholds"] == card["stored_rule"]["exit_thresholds"] == [0.0, 1.0]
    assert (card["stored_rule"]["early_exit_threshold"], card["stored_rule"]["is_default"]) == (
        None,
        True,
    )
    assert (metrics["exit_thresholds"], metrics["exit_tokens"].keys()) == ([0.0, 1.0], {"1"})


def test_a_score_is_paired_with_the_full_models_and_proven_rules_are_timed(
    checkpoint, texts, tmp_path, capsys
):
    words = f"--task-loss 30 --score exact_match --confidence 0.8 --dry-run {RULES}"
    words += " --rank-by time --repeats 1 --thresholds 0.5 0"
    assert run(checkpoint, tmp_path, texts, words) == 0
    # The full model never says " fox", so no rule can lose anything.
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert [one["is_proven"] for one in choice["tested"]] == [True] * 2
    assert len(choice["gains"]) == 2
    fastest = max(one["speedup_interval"][0] for one in choice["gains"])
    assert all(one["speedup_interval"][0] <= one["speedup"] for one in choice["gains"])
    shown = capsys.readouterr().out
    # Which one is faster is the machine's to say.
    if fastest > 1:
        assert "Promise: at most 30 points of exact_match lost" in shown
        assert re.search(r"Speed-up: \d.\d\dx \(\d.\d\d to \d.\d\d\), against mode full", shown)
    else:
        assert "no proven rule is certainly faster than the full model" in shown


def test_too_few_texts_store_nothing_and_say_how_many_are_needed(
    checkpoint, texts, tmp_path, capsys
):
    store_rule(checkpoint, make_rule(), described_without_rule(checkpoint))
    words = f"--agreement 0.99 --items 6 {SEVERAL}"
    assert run(checkpoint, tmp_path, texts, words) == 1
    shown = capsys.readouterr().out
    count = needed.texts_needed(0.01, 0.025)
    assert f"task held_out has 6 texts, and needs {count} at least" in shown
    assert run(checkpoint, tmp_path, texts, f"--agreement 0.999999999 {SEVERAL}") == 1
    assert "needs more than 10,000,000, even if none" in capsys.readouterr().out
    # Nothing was seen of the texts, which can still prove a lesser promise.
    assert not list(tmp_path.iterdir())
    # What was stored stays.
    assert f"stays in force: {make_rule().sentence()}, of iter_0000007" in shown
    assert read_description(checkpoint).rule == make_rule()
    store_rule(checkpoint, None, described_without_rule(checkpoint))


def test_a_rule_that_is_replaced_is_named(tmp_path, capsys):
    report(make_rule(kv_policy="exact"), RULE, tmp_path, is_dry=False)
    assert f"It replaces: {RULE.sentence()}, of iter_0000007" in capsys.readouterr().out
    report(make_rule(kv_policy="exact"), RULE, tmp_path, is_dry=True)
    assert f"stays in force: {RULE.sentence()}" in capsys.readouterr().out


def test_a_model_without_exits_has_no_rule(texts, tmp_path, capsys):
    plain = save_text_checkpoint(tmp_path, exits=())
    assert run(plain, tmp_path / "out", texts, "--agreement 0.5") == 2
    assert "the model has no exits, allowed: one that has" in capsys.readouterr().err


def test_flags_come_before_the_stored_rule_and_that_before_what_is_built_in():
    def exits(*words: str, rule=RULE):
        return settings_of(
            server_parser().parse_args(["--load", "model", *words]), (1, 3), "entropy", rule=rule
        ).exits

    stored = exits()
    assert (stored.mode, stored.early_exit_threshold) == ("early_exit", 0.25)
    assert (stored.exit_measure, stored.exit_layers) == ("margin", (1,))
    assert stored.kv_policy == "propagate"
    built_in = exits(rule=None)
    assert (built_in.mode, built_in.early_exit_threshold) == ("self_speculative", 0.8)
    assert (built_in.exit_measure, built_in.exit_layers) == ("entropy", None)
    assert built_in.kv_policy == "exact"
    flags = "--mode full --early-exit-threshold 0 --exit-measure entropy --exit-layers 1 3"
    given = exits(*flags.split(), "--kv-policy", "exact")
    assert (given.mode, given.early_exit_threshold, given.exit_layers) == ("full", 0.0, (1, 3))
    assert (given.exit_measure, given.kv_policy) == ("entropy", "exact")


@pytest.mark.parametrize(
    "flags",
    [
        *("--draft-exit-layer 1", "--draft-method auto", "--num-draft-tokens 2"),
        *("--draft-confidence 0.5", "--exit-measure entropy", "--exit-layers 3"),
        *("--kv-policy exact", "--exit-thresholds 0.5 0.6", "--exits-pay-at 4"),
        # What would apply without the flag, too, is said as well.
        *("--num-draft-tokens 4", "--exits-pay-at 0", "--exit-threshold-decay 0"),
    ],
)
def test_flags_of_exits_have_the_mode_that_they_had_before_a_rule_was_stored(flags):
    args = server_parser().parse_args(["--load", "model", *flags.split()])
    assert said_of_exits(args) == [flags.split()[0]]
    exits = settings_of(args, (1, 3), "entropy", rule=RULE).exits
    assert (exits.mode, "mode" in exits.stored) == ("self_speculative", False)
    if "thresholds" in flags:
        assert (exits.exit_layers, exits.exit_thresholds) == (None, (0.5, 0.6))
    if "measure" in flags:
        assert exits.early_exit_threshold == 0.8


def test_the_server_answers_by_the_rule_and_shows_it(checkpoint):
    rule = make_rule(locate(checkpoint).iteration_dir.name, early_exit_threshold=0.0)
    store_rule(checkpoint, rule, described_without_rule(checkpoint))
    args = server_parser().parse_args(["--load", str(checkpoint)])
    exits = settings_of(args, (1, 3), rule=rule).exits
    try:
        with text_server(checkpoint, exits=exits) as server:
            cards = {one["id"]: one for one in server.get("/v1/models").json()["data"]}
            body = {"model": NAME, "prompt": "quick", "max_tokens": 4}
            answer = server.post("/v1/completions", body).json()
            lossless = {**body, "mode": "self_speculative"}
            other = server.post("/v1/completions", lossless).json()
            theirs = {"prompts": ["quick"], "tokens_to_generate": 4}
            old = server.post("/api", theirs).json()
            # EE-LLM's clients always send these.
            sent = {**theirs, "early_exit_thres": 1.0, "exit_layers": []}
            always = server.post("/api", sent).json()
            wanted = server.post("/api", {**sent, "use_early_exit": True}).json()
            scored = {**body, "max_tokens": 0, "echo": True, "logprobs": 0}
            scores = server.post("/v1/completions", scored).json()
    finally:
        store_rule(checkpoint, None, described_without_rule(checkpoint))
    metrics = answer["metrics"]
    assert (metrics["mode"], metrics["exit_measure"]) == ("early_exit", "margin")
    assert (metrics["kv_policy"], metrics["exit_tokens"].keys()) == ("propagate", {"1"})
    assert other["metrics"]["mode"] == "self_speculative"
    assert set(old["exit_layers"][0]) == set(always["exit_layers"][0]) == {1}
    assert set(wanted["exit_layers"][0]) == {4}
    assert scores["metrics"]["mode"] == "full"
    card = cards[NAME]
    assert (card["default_mode"], card["default_exit_layers"]) == ("early_exit", [1])
    assert (card["early_exit_threshold"], card["kv_policy"]) == (0.0, "propagate")
    assert card["stored_rule"]["is_default"] is True
    assert card["stored_rule"]["promise"]["agreement"] == 0.99
    assert card["stored_rule"]["says"] == rule.promise.sentence()
    assert cards[f"{NAME}:full"]["stored_rule"]["is_default"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--agreement: is not given, and --task-loss neither, allowed: one or both"),
        ("--agreement 1", "--agreement 1.0 is out of range, allowed: above 0, less than 1"),
        ("--agreement 0", "--agreement 0.0 is out of range"),
        ("--task-loss 100", "--task-loss 100.0 is out of range, allowed: above 0, less than 100"),
        ("--agreement 0.9 --confidence 2", "--confidence 2.0 is out of range"),
        ("--agreement 0.9 --score f1", "--score 'f1' has no effect without --task-loss"),
        ("--agreement 0.9 --thresholds 2", "--thresholds 2.0 is out of range, allowed: 0 to 1"),
        ("--agreement 0.9 --timed-texts 0", "--timed-texts 0 is out of range, allowed: 2 or"),
        ("--task-loss 1 --score accuracy", "--score accuracy: task held_out has none, allowed:"),
        (
            "--agreement 0.9 --exit-layers 2",
            "--exit-layers: 2 has one that the model does not have",
        ),
        (
            "--agreement 0.9 --rank-by depth --repeats 2",
            "--repeats 2 has no effect with --rank-by depth",
        ),
        (
            "--agreement 0.9 --exit-layers 3 --fitting-texts 4",
            "--fitting-texts 4 has no effect: no exits are asked together, allowed: 0",
        ),
        ("--agreement 0.9 --fitting-texts -1", "--fitting-texts -1 is out of range, allowed: 0 or"),
        ("--agreement 0.9 --fitting-texts 40", "leaves no text of task held_out that proves"),
        ("--clear --agreement 0.9", "--agreement 0.9 has no effect with --clear"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_measured(
    words, message, checkpoint, texts, tmp_path, capsys
):
    flags = f"--load {checkpoint} {words}".split()
    if "--clear" not in words:
        flags += ["--no-compile", "--tasks", str(texts), "--output-dir", str(tmp_path / "out")]
        if "timed" not in words:
            flags += ["--timed-texts", "2"]
    assert main(flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_document_has_the_table_and_valid_flags():
    text = DOCUMENT.read_text()
    assert needed.table() in text
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(one.replace("\\\n", " ")) for one in blocks]
    chosen = [words for words in commands if words[1] == "tools/choose_threshold.py"]
    assert chosen
    for _, _, *words in chosen:
        build_parser().parse_args(words)
