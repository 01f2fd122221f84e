"""A report as one page that asks for nothing else: figures, tables, and all texts by depth."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron.early_exit.evaluation.figures import PICTURES, as_svg
from megatron.early_exit.evaluation.items import ALL
from megatron.early_exit.evaluation.outside_summary import OutsideSummary
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import exits_name
from megatron.early_exit.evaluation.summary import Estimate, Outcome, Summary
from megatron.early_exit.evaluation.tradeoff import threshold_name

_PLACE = re.compile("@([a-z]+)@")
_MOST_TEXTS = 50
"""Prompts whose texts are in the page, with which a browser copes."""
_POINT_HEADS = (
    *("threshold", "tokens/s", "speed-up", "95 % interval", "quartiles of prompts"),
    *("mean layer", "agreement", "95 % interval", "teacher-forced", "same text"),
    *("perplexity of answers", "of held-out text"),
)


def write_report(
    path: Path,
    header: Mapping[str, Any],
    records: Sequence[Record],
    summary: Summary,
    figures: Mapping[str, Figure],
) -> None:
    """Write the page; figures get the colours of its text and are of no other use afterwards.

    Args:
        path: of the file.
        header: what all records have in common.
        records: of all prompts.
        summary: what was found of them.
        figures: the pictures, by their names.
    """
    parts = files(__package__) / "report_page"
    model = Path(header["model"]["checkpoint"])
    texts = {
        "title": escape(f"Evaluation of {model.parent.name}/{model.name}"),
        "about": _about(header),
        "figures": "\n".join(
            f"<figure>{as_svg(figure, name)}<figcaption>{escape(PICTURES[name])}</figcaption>"
            "</figure>"
            for name, figure in figures.items()
        ),
        "outside": _outside(summary.outside),
        "tables": _tables(summary),
        "exits": _exits(summary),
        "texts": _about_texts(len(header["items"])),
        "style": (parts / "report.css").read_text(encoding="utf-8").strip(),
        "script": (parts / "report.js").read_text(encoding="utf-8").strip(),
        # What ends a script must not stand in the text of one.
        "data": json.dumps(page_data(header, records)).replace("<", "\\u003c"),
    }
    page = (parts / "report.html").read_text(encoding="utf-8")
    path.write_text(_PLACE.sub(lambda found: texts[found[1]], page), encoding="utf-8")


def page_data(header: Mapping[str, Any], records: Iterable[Record]) -> dict[str, Any]:
    """What the page's script reads: prompts with their answers up to the end of the text, the full
    model's first. Of many prompts it has some, from the whole list."""
    fields = ("task", "prompt", "reference", "choices", "gold")
    items = header["items"]
    count = min(len(items), _MOST_TEXTS)
    shown = {
        index: {key: items[index][key] for key in fields} | {"answers": []}
        for index in (number * len(items) // count for number in range(count))
    }
    for one in records:
        if one["kind"] not in ("answer", "choice") or one["index"] not in shown:
            continue
        answer = {key: one[key] for key in ("threshold", "kv_policy", "measure")}
        answer["exits"] = None if one["exits_asked"] is None else exits_name(one["exits_asked"])
        if one["kind"] == "answer":
            for key in ("token_texts", "exit_layers", "agrees"):
                answer[key] = one[key][: one["counted"]]
            answer["scores"] = one["scores"]
            confidences = one["confidences"][: one["counted"]]
            answer["confidences"] = [round(value, 4) for value in confidences]
        else:
            answer["logprobs"] = [total["logprob"] for total in one["choices"]]
        shown[one["index"]]["answers"].append(answer)
    layers = [*header["model"]["exit_layers"], header["model"]["num_layers"]]
    return {"layers": layers, "items": list(shown.values())}


def _about_texts(count: int) -> str:
    if count <= _MOST_TEXTS:
        return ""
    return (
        f"<p>{_MOST_TEXTS} of {count} prompts are shown, from the whole list; results.json has the "
        "texts of all.</p>"
    )


def _about(header: Mapping[str, Any]) -> str:
    """What was measured, and where, as a list."""
    model, machine, software = header["model"], header["machine"], header["software"]
    settings = header["settings"]
    layers = ", ".join(map(str, model["exit_layers"]))
    rows = {
        "model": f"{model['checkpoint']}: {model['num_layers']} layers, exits after {layers}",
        "weights": f"{model['weight_dtype'] or model['dtype']}, computed in {model['dtype']}, "
        f"{'compiled' if model['compile'] else 'plain'} layers",
        "machine": machine.get("gpu", machine["cpu"])
        + f", {machine['cores']} cores, {machine['instruction_set']}, {machine['threads']} threads",
        "prompts": f"{len(header['items'])} of {', '.join(settings['tasks'])}",
        "answers": f"{settings['max_tokens']} tokens each, greedy, {settings['repeats']} times in "
        "turns with the full model; median times of whole answers, their prompts included",
        "software": f"commit {software['commit'] or 'unknown'}, Python {software['python']}, "
        + ", ".join(f"{name} {version}" for name, version in software["packages"].items()),
    }
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())


def _outside(found: OutsideSummary | None) -> str:
    """How the full model compares with the outside baseline, where that was measured."""
    if found is None:
        return ""
    heads, cells = [], []
    if found.tokens_per_second is not None:
        heads += [
            *("full model, tokens/s (wall clock)", "transformers, tokens/s (wall clock)"),
            *("its speed-up", "95 % interval"),
        ]
        cells += [
            f"{found.tokens_per_second.full:.1f}",
            f"{found.tokens_per_second.outside:.1f}",
            f"{found.speedup:.2f}x",
            _range(found.speedup_interval, "{:.2f}"),
        ]
    if found.batch is not None:
        heads += ["transformers in batches, tokens/s (wall clock)", "its speed-up", "95 % interval"]
        cells += [
            f"{found.batch.tokens_per_second:.1f}",
            f"{found.batch.speedup:.2f}x",
            _range(found.batch.speedup_interval, "{:.2f}"),
        ]
    table = _html_table(heads, [cells]) if heads else ""
    return f"<h3>Beside transformers</h3><p>{escape(found.sentence())}.</p>{table}"


def _tables(summary: Summary) -> str:
    """A table for each task and curve; only the first one is open."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in summary.outcomes:
        groups.setdefault((one.task, one.curve), []).append(one)
    parts = []
    for number, ((task, curve), outcomes) in enumerate(groups.items()):
        name = "all tasks" if task == ALL else f"task {task}"
        parts.append(
            f"<details{' open' if number == 0 else ''}><summary>{escape(f'{curve}: {name}')}"
            f"</summary>{_table(outcomes)}</details>"
        )
    return "\n".join(parts)


def _table(outcomes: Sequence[Outcome]) -> str:
    scores = list(dict.fromkeys(name for one in outcomes for name in one.scores))
    has_batch = any(one.batch is not None for one in outcomes)
    heads = ["threshold"] if outcomes[0].point is None else list(_POINT_HEADS)
    for name in scores:
        heads += [name.replace("_", " "), "p (Holm)"]
    heads += ["speed-up in batches", "95 % interval"] if has_batch else []
    rows = []
    for one in outcomes:
        cells = ["full model" if one.threshold is None else threshold_name(one.threshold)]
        if one.point is not None:
            cells += _point_cells(one)
        for name in scores:
            cells += [
                _score(one.scores.get(name), one.threshold is None),
                _p_values(one.scores.get(name)),
            ]
        if has_batch:
            batch = one.batch
            cells += (
                ["", ""]
                if batch is None
                else [
                    f"{batch.speedup:.2f}x",
                    _range(batch.speedup_interval, "{:.2f}"),
                ]
            )
        rows.append(cells)
    return _html_table(heads, rows)


def _score(found: Estimate | None, is_full: bool) -> str:
    if found is None:
        return "none"
    difference = "" if is_full else f" ({_range(found.difference_interval, '{:+.3f}')})"
    excluded = f", {found.excluded} prompts excluded" if found.excluded else ""
    return f"{found.value:.3f}{difference}{excluded}"


def _p_values(found: Estimate | None) -> str:
    """The p-value against the full model, and the one that is adjusted for all rules; of the full
    model the least that a rule can have."""
    if found is None:
        return ""
    if found.adjusted_p_value is None:
        return f"least possible {found.least_p_value:.3g} ({found.least_adjusted_p_value:.3g})"
    return f"{found.p_value:.3g} ({found.adjusted_p_value:.3g})"


def _point_cells(outcome: Outcome) -> list[str]:
    point = outcome.point
    assert point is not None
    return [
        f"{point.tokens_per_second:.1f}",
        f"{point.speedup:.2f}x",
        _range(point.speedup_interval, "{:.2f}"),
        _range(outcome.speedup_quartiles, "{:.2f}"),
        f"{point.mean_exit_layer:.1f}",
        f"{point.agreement:.1%}",
        _range(point.agreement_interval, "{:.1%}"),
        "" if outcome.forced_agreement is None else f"{outcome.forced_agreement:.1%}",
        f"{point.identical:.1%}",
        f"{point.perplexity:.2f}",
        _number(outcome.held_out_perplexity),
    ]


def _exits(summary: Summary) -> str:
    rows = [
        [
            one.measure,
            str(one.layer),
            f"{one.agreement:.1%}",
            _number(one.held_out_perplexity),
            f"{one.calibration_error:.3f}",
        ]
        for one in summary.exits
    ]
    heads = ["measure", "after layer", "agreement", "perplexity", "calibration error"]
    return _html_table(heads, rows)


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _range(bounds: Sequence[float] | None, form: str) -> str:
    return (
        "too few"
        if bounds is None
        else " to ".join((form.format(bounds[0]), form.format(bounds[-1])))
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
