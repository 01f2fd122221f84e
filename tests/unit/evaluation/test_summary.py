"""Figures and pages of records that are written by hand."""

from __future__ import annotations

import matplotlib
import pytest

from megatron.early_exit.evaluation.figures import figures_of, tradeoff_curve
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.report import page_data, write_report
from megatron.early_exit.evaluation.scoring import Judge
from megatron.early_exit.evaluation.summary import Summary, summarize
from megatron.early_exit.evaluation.text_figure import text_by_depth
from megatron.early_exit.evaluation.tradeoff import Point, table, threshold_name
from megatron.early_exit.inference.results import PromptToken

THRESHOLDS = (0.991, 0.992, 0.5)
EXITS = {"max_probability": {"2": {"confidences": [0.1, 0.2, 0.9, 0.9], "agrees": [1, 0, 1, 1]}}}


def answer(index: int, threshold: float | None, counted: int) -> Record:
    """An answer of four tokens, of which the last ones are behind the end of the text."""
    common = {
        "kind": "answer",
        "index": index,
        "threshold": threshold,
        "exits_asked": None,
        "counted": counted,
        "tokens": [1, 2, 3, 4],
        "token_texts": ["a", "b", "c", "d"],
        "confidences": [0.5] * 4,
        "logprobs": [-1.0, -1.0, -9.0, -9.0],
        "scores": {},
        "held_out": None,
    }
    if threshold is None:
        return common | {
            "kv_policy": None,
            "measure": None,
            "exit_layers": [8] * 4,
            "agrees": [True] * 4,
            "exits": EXITS,
            "exits_held_out": {"2": None},
        }
    return common | {
        "kv_policy": "exact",
        "measure": "max_probability",
        "exit_layers": [2, 8, 2, 2],
        "agrees": [True, False, False, False],
        "same": [True] * 4,
        "forced_agrees": [True, True, False, False],
        "seconds": [1.0, 3.0, 1.5],
        "full_seconds": [4.0, 3.0, 9.0],
        "catch_up_seconds": [0.5, 0.4, 0.6],
    }


def summary(prompts: int = 2, full: int = 3, counted: int = 2) -> Summary:
    records = [answer(index, None, full) for index in range(prompts)]
    for threshold in THRESHOLDS:
        records += [answer(index, threshold, counted) for index in range(prompts)]
    return summarize(records, ["own"] * prompts, seed=0)


def test_tokens_behind_the_end_count_for_speed_alone():
    found = summary()
    outcome = next(one for one in found.outcomes if one.threshold == 0.5)
    point = outcome.point
    assert point.agreement == 1 / 2
    # The full text has a third token, which the rule's has not.
    assert point.identical == pytest.approx(2 / 3)
    assert point.mean_exit_layer == 5
    assert point.perplexity == pytest.approx(2.718281828)
    assert outcome.forced_agreement == pytest.approx(2 / 3)
    assert outcome.exit_shares == {2: 0.5, 8: 0.5}
    assert outcome.depths == [2, 8]
    (exit,) = found.exits
    assert exit.agreement == pytest.approx(2 / 3)
    # All four tokens were timed, and what was left undone.
    assert point.tokens_per_second == pytest.approx(4 / 2)
    assert point.speedup == pytest.approx(4 / 2)
    longer = next(one for one in summary(full=2, counted=3).outcomes if one.threshold == 0.5)
    assert longer.point.identical == pytest.approx(2 / 3)
    assert longer.forced_agreement == 1


def test_the_full_model_agrees_with_itself_up_to_the_end_of_its_text():
    outcome = summary().outcomes[0]
    assert outcome.threshold is None
    assert outcome.point.identical == outcome.point.speedup == outcome.forced_agreement == 1
    assert len(outcome.depths) == 3


def test_thresholds_have_all_of_their_digits():
    assert [threshold_name(one) for one in (1, 0.5, 0.95, 0.991)] == [
        "1.00",
        "0.50",
        "0.95",
        "0.991",
    ]
    found = summary()
    lines = table(found.points()).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["0.991", "0.992", "0.50"]
    figures = figures_of(found, 8)
    (bars,) = figures["exits"].axes
    assert [text.get_text() for text in bars.get_xticklabels()] == [
        "full",
        "0.991",
        "0.992",
        "0.50",
    ]
    # Each threshold has a bar of its own, for each number of layers.
    assert len({bar.get_x() for bar in bars.patches}) == 4
    depths, _ = figures["depth_over_position"].axes
    assert [text.get_text() for text in depths.get_yticklabels()][1:3] == ["0.991", "0.992"]


def test_a_text_is_drawn_token_by_token_on_its_depths():
    records = [answer(0, None, 4), answer(0, 0.5, 1), answer(0, 0.4, 4)]
    records[2] |= {"token_texts": ["a$", " b\n", "x" * 70, "\x02"], "exit_layers": [2, 8, 4, 2]}
    figure = text_by_depth(records, 8)
    axes, bar = figure.axes
    assert axes.get_title() == "An answer by depth, max_probability, exact, threshold 0.40"
    # A line ends where it is full, not where the text's does.
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [
        (r"a\$", 0),
        ("\u00b7b\u21b5", 0),
        ("x" * 70, 1),
        ("\ufffd", 1),
    ]
    shades = matplotlib.colormaps["viridis"]
    found = [one.get_facecolor() for one in axes.patches]
    assert found == [pytest.approx(shades(layer / 8)) for layer in (2, 8, 4, 2)]
    assert list(bar.get_xticks()) == [0, 2, 4, 8]
    assert text_by_depth([answer(0, None, 4)], 8) is None


def test_of_a_long_text_the_first_lines_are_drawn():
    long = answer(0, 0.5, 100) | {"token_texts": ["x" * 72] * 100, "exit_layers": [2, 8] * 50}
    figure = text_by_depth([long], 8)
    axes, _ = figure.axes
    assert len(axes.texts) == len(axes.patches) == 40
    assert axes.get_title().endswith("threshold 0.50\nits first 40 of 100 lines")
    assert figure.get_figheight() < 13


def test_the_outside_baseline_is_compared_up_to_the_end_of_the_text():
    beside = {
        "kind": "transformers",
        "threshold": None,
        "exits_asked": None,
        "tokens": [1, 2, 3, 9],
        "same": [True, True, True, False],
        "choices": [1, 2, 7, 9],
        "logprobs": [-1.0, -1.0, -1.0, -9.0],
        "held_out": None,
        "seconds": [2.0],
        "full_seconds": [4.0],
    }
    records = [answer(index, None, 3 - index) for index in range(2)]
    records += [answer(index, 0.5, 2) for index in range(2)]
    records += [{**beside, "index": index} for index in range(2)]
    found = summarize(records, ["own"] * 2, seed=0)
    assert found.outside.equal_answers == 2
    assert found.outside.agreement == 4 / 5
    assert found.outside.answer_perplexity.outside == pytest.approx(2.718281828)
    # The same definition as of rules.
    assert found.outside.answer_perplexity.full == found.outcomes[0].point.perplexity
    # All four tokens were timed.
    assert found.outside.tokens_per_second.outside == 4 / 2


def test_the_outside_baseline_is_marked_on_the_curve():
    points = summary().points()
    (axes,) = tradeoff_curve(points, is_one_engine=True, outside=0.5).axes
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.5, 100)
    (axes,) = tradeoff_curve(points, is_one_engine=True).axes
    assert all(line.get_marker() != "*" for line in axes.lines)


def test_p_values_are_adjusted_for_all_rules_of_a_task(tmp_path):
    """Two rules on two tasks: one always scores less than the full model, the other never."""
    records = []
    for index in range(12):
        for threshold, value in ((None, 1.0), (0.9, 1.0), (0.5, 0.0)):
            records.append(answer(index, threshold, 2) | {"scores": {"f1": value}})
    found = summarize(records, ["one"] * 6 + ["two"] * 6, seed=0)
    for outcome in found.outcomes:
        score = outcome.scores["f1"]
        count = 12 if outcome.task == "all" else 6
        if outcome.threshold is None:
            assert score.adjusted_p_value is None
            assert score.least_p_value == 2 / 2**count
            assert score.least_adjusted_p_value == 4 / 2**count
        elif outcome.threshold == 0.9:
            assert score.p_value == score.adjusted_p_value == 1
        else:
            assert score.p_value == pytest.approx(2 / 2**count)
            assert score.adjusted_p_value == pytest.approx(4 / 2**count)
    write_report(tmp_path / "page.html", header(12), records, found, {})
    page = (tmp_path / "page.html").read_text()
    for least in ("0.000488 (0.000977)", "0.0312 (0.0625)"):
        assert f"<td>least possible {least}</td>" in page


def test_a_curve_has_the_speed_ups_of_pairs():
    points = [
        Point("a", None, 100.0, 1.0, 8, 1.0, 1.0, 2.0),
        Point("a", 0.5, 180.0, 1.5, 4, 0.9, 0.9, 2.0),
        Point("b", None, 200.0, 1.0, 8, 1.0, 1.0, 2.0),
        Point("b", 0.5, 500.0, 2.5, 4, 0.9, 0.9, 2.0),
    ]

    def speeds(is_one_engine: bool) -> list[float]:
        (axes,) = tradeoff_curve(points, is_one_engine=is_one_engine).axes
        return [float(line.get_xdata()[0]) for line in axes.lines]

    assert speeds(True) == [1.5, 1.0, 2.5, 1.0]
    assert speeds(False) == [1.5, 1.0, 5.0, 2.0]


def test_one_prompt_has_no_interval(tmp_path):
    found = summary(prompts=1)
    point = found.outcomes[1].point
    assert point.speedup_interval is point.agreement_interval is None
    assert found.outcomes[1].forced_agreement_interval is None
    write_report(tmp_path / "page.html", header(1), [answer(0, None, 3)], found, {})
    text = (tmp_path / "page.html").read_text()
    assert "<td>too few</td>" in text
    assert "prompts are shown" not in text


def header(prompts: int) -> dict:
    item = {"task": "own", "prompt": "p", "reference": None, "choices": [], "gold": None}
    return {
        "model": {
            "checkpoint": "a/b",
            "num_layers": 8,
            "exit_layers": [2],
            "weight_dtype": None,
            "dtype": "fp32",
            "compile": False,
        },
        "settings": {"tasks": ["own"], "max_tokens": 4, "repeats": 3},
        "machine": {"cpu": "one", "cores": 1, "instruction_set": "none", "threads": 1},
        "software": {"commit": None, "python": "3", "packages": {}},
        "items": [{**item, "prompt": str(number)} for number in range(prompts)],
    }


def test_a_page_has_texts_of_some_of_many_prompts(tmp_path):
    records = [answer(index, None, 3) for index in range(120)]
    data = page_data(header(120), records)
    prompts = [int(item["prompt"]) for item in data["items"]]
    assert len(prompts) == 50
    assert prompts == sorted({*prompts})
    assert prompts[-1] > 110
    assert all(len(item["answers"]) == 1 for item in data["items"])
    assert data["items"][0]["answers"][0]["token_texts"] == ["a", "b", "c"]
    write_report(tmp_path / "page.html", header(120), records, summary(), {})
    assert "50 of 120 prompts are shown" in (tmp_path / "page.html").read_text()


def test_names_of_tasks_are_no_formulas():
    names = ["_a", "$b$", *"cdefgh"]
    records = [answer(index, None, 3) for index in range(len(names))]
    records += [answer(index, 0.5, 2) for index in range(len(names))]
    figure = figures_of(summarize(records, names, seed=0), 8)["speedup_by_task"]
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[:3] == ["all tasks", "task _a", r"task \$b\$"]
    assert legend._ncols == 4


def test_a_judge_keeps_the_last_texts(monkeypatch):
    looked: list[tuple[int, ...]] = []

    def score(_engine, text):
        looked.append(tuple(text))
        return [PromptToken(text[1], -1.0, top_logprobs=((text[1], -1.0),))]

    monkeypatch.setattr("megatron.early_exit.evaluation.scoring.score", score)
    judge = Judge(None)
    for _ in range(2):
        assert judge.of([1], [5]) == [(True, -1.0)]
    assert len(looked) == 1
    for token in range(1000, 1300):
        judge.of([1], [token])
    assert len(judge._found) == 256
    judge.of([1], [5])
    assert looked[-1] == (1, 5)
