"""The command that evaluates a model: its flags, its documentation, and its report in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
from lm_eval._cli.harness import HarnessCLI
from playwright.sync_api import Browser, expect

from megatron.early_exit.evaluation.lm_eval_model import _rule
from megatron.early_exit.evaluation.outside_baseline import LeftOut
from megatron.early_exit.evaluation.settings import DEFAULT_THRESHOLDS
from tests.helpers.speed import patient
from tests.helpers.text_checkpoint import EXITS, save_text_checkpoint
from tools.checkpoint import build_parser as checkpoint_parser
from tools.evaluate import build_parser, main, outside_of
from tools.run_early_exit_text_generation_server import build_parser as server_parser

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENT, REPRODUCE = DOCS / "evaluate.md", DOCS / "reproduce.md"
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
    assert results["outside_baseline"] == "transformers"
    outside = results["outside"]
    assert outside["answers"] == outside["equal_answers"] == 1
    assert outside["accuracy"]["full"] == outside["accuracy"]["outside"]
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
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
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
        ("--exit-layers 3+3", "--exit-layers (3, 3) has one twice, allowed: each exit once"),
        ("--exit-layers 1 1", "--exit-layers ((1,), (1,)) are none, or one is given twice"),
        (
            "--tasks manual --no-compile --exit-layers 2 --no-transformers",
            "--exit-layers: 2 has one that the model does not have, allowed: 1+3",
        ),
        (
            "--tasks manual --no-compile --exit-layers all 1+3",
            "--exit-layers (None, None) are none, or one is given twice",
        ),
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


def commands(document: Path) -> list[list[str]]:
    """The words of every command in a document's blocks, of a loop those inside of it."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.replace("$threshold", "0.5")) for line in lines]
    return [words for words in found if words and words[0] == ".venv/bin/python"]


def test_commands_of_the_documents_have_valid_flags(monkeypatch):
    parsers = {"evaluate": build_parser(), "checkpoint": checkpoint_parser()}
    parsers["run_early_exit_text_generation_server"] = server_parser()
    found = [*commands(DOCUMENT), *commands(REPRODUCE)]
    for _, tool, *words in found:
        name = tool.removeprefix("tools/").removesuffix(".py")
        if name == "run_lm_eval":
            monkeypatch.setattr("sys.argv", [tool, "run", *words])
            args = HarnessCLI().parse_args()
            assert "early_exit_threshold" not in args.model_args or _rule(args.model_args)
        elif words[0] != "report":
            parsers[name].parse_args(words)
    assert len(found) == 13
    defaults = build_parser().parse_args(["--load", "a", "--output-dir", "b"])
    assert defaults.thresholds == list(DEFAULT_THRESHOLDS)
    assert DEFAULT_THRESHOLDS[:2] == (1.0, 0.95)
    assert (DEFAULT_THRESHOLDS[-1], len(DEFAULT_THRESHOLDS)) == (0.0, 21)


def test_tasks_of_the_recipes_are_lm_evals():
    text = REPRODUCE.read_text()
    tasks = Path(lm_eval.__file__).parent / "tasks"
    known = {
        name
        for folder in ("cnn_dailymail", "unitxt", "scrolls", "mmlu/generative")
        for path in (tasks / folder).glob("*.yaml")
        for name in re.findall(r"^\"?(?:task|group)\"?: \"?(\w+)", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"\b(?:mmlu\w*_generative|cnn_dailymail_abisee|xsum|scrolls_\w+)", text))
    assert len(named) == 9
    assert named <= known


def test_a_report_is_written_again(evaluated, tmp_path, capsys):
    shutil.copy(evaluated / "records.jsonl", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "full model and transformers: texts equal 1 of 1" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_bytes() == (evaluated / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "records.jsonl is no file, allowed: the folder of" in capsys.readouterr().err


def test_a_model_that_transformers_does_not_have_is_measured_alone(checkpoint, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr("tools.evaluate.OutsideBaseline.from_checkpoint", refuse)
    engine = SimpleNamespace(model=SimpleNamespace(dtype=None, device=None))
    flags = ["--load", str(checkpoint), "--output-dir", "b"]
    assert outside_of(build_parser().parse_args(flags), engine, None) is None
    assert capsys.readouterr().err == "transformers is not measured: no such model\n"
    with pytest.raises(ValueError, match=r"--transformers: .* not measured: no such model"):
        outside_of(build_parser().parse_args([*flags, "--transformers"]), engine, None)
    with pytest.raises(ValueError, match="does not compute our weights in int8"):
        outside_of(build_parser().parse_args([*flags, "--transformers"]), engine, "int8")


def test_what_has_begun_goes_on_as_it_has_begun(checkpoint, tmp_path, monkeypatch):
    """With transformers or without, whatever this start would have chosen by itself."""
    baseline = object()
    monkeypatch.setattr("tools.evaluate.OutsideBaseline.from_checkpoint", lambda *_: baseline)
    engine = SimpleNamespace(model=SimpleNamespace(dtype=None, device=None))
    flags = ["--load", str(checkpoint), "--output-dir", str(tmp_path)]

    def found(*words: str) -> object:
        return outside_of(build_parser().parse_args([*flags, *words]), engine, None)

    assert found() is baseline
    records = tmp_path / "records.jsonl"
    records.write_text('{"outside_baseline": "transf')
    assert found() is baseline
    records.write_text('{"outside_baseline": null}\n')
    assert found() is found("--no-transformers") is None
    with pytest.raises(ValueError, match="has records of a measurement without it, allowed: ano"):
        found("--transformers")
    records.write_text('{"outside_baseline": "transformers"}\n')
    assert found() is found("--transformers") is baseline
    assert found("--no-transformers") == LeftOut("--no-transformers")
    args = build_parser().parse_args(flags)
    reason = "it does not compute our weights in int8"
    assert outside_of(args, engine, "int8") == LeftOut(reason)
    with records.open("a") as file:
        file.write('{"left_out": "it has failed"}\n')
    assert found() == LeftOut("it has failed")
    assert found("--transformers") is baseline


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
