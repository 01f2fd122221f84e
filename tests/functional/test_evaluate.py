"""The command that evaluates a model: its flags, its documentation, and its report in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from megatron.early_exit.evaluation.settings import DEFAULT_THRESHOLDS
from tests.helpers.speed import patient
from tests.helpers.text_checkpoint import EXITS, save_text_checkpoint
from tools.evaluate import build_parser, main

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evaluate.md"
CHOICES = [" brown fox", " lazy dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(checkpoint: Path, folder: Path, *words: str) -> int:
    return main(["--load", str(checkpoint), "--output-dir", str(folder), *words])


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tasks = folder / "own.jsonl"
    lines = [
        {"prompt": "the quick <b>brown", "reference": " fox"},
        {"prompt": "the quick", "choices": CHOICES, "gold": 1},
    ]
    tasks.write_text("\n".join(map(json.dumps, lines)))
    words = f"--tasks {tasks} --thresholds 0.5 0 --max-tokens 6 --repeats 1 --no-compile"
    assert run(checkpoint, folder, *words.split()) == 0
    return folder


def test_the_result_says_what_was_measured_and_how(evaluated, checkpoint):
    results = json.loads((evaluated / "results.json").read_text())
    assert results["model"]["checkpoint"] == str(next(checkpoint.glob("iter_*")))
    assert results["model"]["exit_layers"] == list(EXITS)
    assert results["model"]["compile"] is False
    assert len(results["model"]["fingerprint"]) == 64
    assert results["settings"]["measures"] == ["max_probability"]
    assert results["settings"]["kv_policies"] == ["exact", "propagate"]
    rules = {(o["kv_policy"], o["threshold"]) for o in results["outcomes"]}
    assert rules == {(policy, t) for policy in ("exact", "propagate") for t in (None, 0.5, 0.0)}


def test_the_report_shows_every_text_in_a_browser(evaluated, browser: Browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(patient(8000))
    complaints: list[str] = []
    addresses: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("request", lambda request: addresses.append(request.url))
    address = (evaluated / "report.html").as_uri()
    page.goto(address)
    expect(page.locator("#prompt")).to_have_text("the quick <b>brown")
    page.get_by_label("threshold").select_option("0")
    tokens = page.locator("#answer .token")
    expect(tokens).to_have_count(6)
    results = json.loads((evaluated / "results.json").read_text())
    (record,) = [
        r
        for r in results["records"]
        if (r["index"], r["threshold"], r["kv_policy"]) == (0, 0.0, "exact")
    ]
    assert record["counted"] == 6
    assert tokens.all_text_contents() == record["token_texts"]
    assert tokens.first.get_attribute("title").startswith(f"layer {EXITS[0]}, confidence 0.")
    other = page.locator("#answer .differs")
    expect(other).to_have_count(record["agrees"].count(False))
    shallow, deep = (
        page.locator(place).first.evaluate("one => getComputedStyle(one).backgroundColor")
        for place in ("#answer .token", "#full .token")
    )
    assert shallow != deep
    page.get_by_role("button", name="next").click()
    expect(page.locator("#answer")).to_contain_text(f"{CHOICES[1]} (right)")
    expect(page.get_by_role("button", name="next")).to_be_disabled()
    context.close()
    assert complaints == []
    assert [one for one in addresses if not one.startswith("data:")] == [address]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--thresholds 1.5", "--thresholds 1.5 is out of range, allowed: 0 to 1"),
        ("--thresholds 0.5 0.5", "--thresholds (0.5, 0.5) are none, or one is given twice"),
        ("--max-tokens 1", "--max-tokens 1 is out of range, allowed: 2 or more"),
        ("--repeats 0", "--repeats 0 is out of range, allowed: 1 or more"),
        ("--batch-size 1", "--batch-size 1 is out of range, allowed: 2 or more"),
        ("--tasks none", "--tasks none: is no task, allowed: next_line, docstring, manual, or a"),
        ("--tasks manual --enable-prefix-caching", "--enable-prefix-caching is refused"),
        ("--tasks manual --max-batch-size 3", "--max-batch-size 3 is refused"),
        ("--tasks manual --draft-vocab-size 9", "--draft-vocab-size 9 has no effect where nothing"),
        ("--tasks manual --no-compile", "tokens, allowed: up to 128, which leaves room for"),
        (
            "--tasks manual --no-compile --measures gate",
            "--measures gate: the exits have no gates, allowed: max_probability margin",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path / "out", *words.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_of_the_document_have_valid_flags():
    blocks = re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        python, tool, *words = shlex.split(block.replace("\\\n", " "))
        assert (python, tool) == (".venv/bin/python", "tools/evaluate.py")
        build_parser().parse_args(words)
    defaults = build_parser().parse_args(["--load", "a", "--output-dir", "b"])
    assert defaults.thresholds == list(DEFAULT_THRESHOLDS)
    assert DEFAULT_THRESHOLDS[:2] == (1.0, 0.95)
    assert (DEFAULT_THRESHOLDS[-1], len(DEFAULT_THRESHOLDS)) == (0.0, 21)


def test_another_model_at_the_same_path_is_refused(evaluated, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copytree(evaluated, tmp_path / "out")
    records = tmp_path / "out" / "records.jsonl"
    header, *rest = records.read_text().splitlines()
    own = str(next((tmp_path / "model").glob("iter_*")))
    moved = header.replace(str(next(checkpoint.glob("iter_*"))), own)
    records.write_text("\n".join([moved, *rest]) + "\n")
    words = f"--tasks {evaluated / 'own.jsonl'} --thresholds 0.5 0 --max-tokens 6 --repeats 1"
    command = (tmp_path / "model", tmp_path / "out", *words.split(), "--no-compile")
    assert run(*command) == 0
    weights = max((tmp_path / "model").rglob("*.distcp"), key=lambda one: one.stat().st_size)
    content = bytearray(weights.read_bytes())
    # Zeros in place of some weights are weights, too.
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    weights.write_bytes(content)
    capsys.readouterr()
    assert run(*command) == 2
    assert "records of another measurement: model.fingerprint was" in capsys.readouterr().err


def test_an_interrupted_measurement_says_how_it_goes_on(checkpoint, tmp_path, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.evaluate.load", interrupt)
    assert run(checkpoint, tmp_path, "--tasks", "manual") == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err
