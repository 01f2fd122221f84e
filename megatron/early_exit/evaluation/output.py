"""The files that an evaluation ends with, made of its records alone."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron.early_exit.evaluation.figures import figures_of, save
from megatron.early_exit.evaluation.items import ALL, Item
from megatron.early_exit.evaluation.records import Record, read_records
from megatron.early_exit.evaluation.report import write_report
from megatron.early_exit.evaluation.rule import exits_name
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.summary import Estimate, Outcome, Summary, summarize
from megatron.early_exit.evaluation.text_figure import text_by_depth
from megatron.early_exit.evaluation.units import OUTSIDE, key_of, units_of

RECORDS, RESULTS, CURVE, REPORT = "records.jsonl", "results.json", "curve.csv", "report.html"


def write_files(folder: Path, header: Mapping[str, Any], records: Sequence[Record]) -> Summary:
    """Summarise the records of a whole measurement, and write all files but the records.

    Args:
        folder: for the files.
        header: what all records have in common.
        records: of all units.

    Raises:
        OSError: a file cannot be written.
    """
    tasks = [one["task"] for one in header["items"]]
    summary = summarize(records, tasks, header["settings"]["seed"])
    results = {**header, **summary.as_dict(), "records": records}
    (folder / RESULTS).write_text(json.dumps(results, allow_nan=False) + "\n")
    write_curve(folder / CURVE, summary)
    figures = figures_of(summary, header["model"]["num_layers"])
    text = text_by_depth(records, header["model"]["num_layers"])
    if text is not None:
        figures["text_by_depth"] = text
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    write_report(folder / REPORT, header, records, summary, figures)
    return summary


def rebuild(folder: Path) -> Summary:
    """Write the files of an evaluation again from its records, without measuring or loading a
    model.

    Args:
        folder: of the evaluation.

    Raises:
        ValueError: the folder has no records of a whole measurement, or damaged ones; its files
            are left as they are.
        OSError: a file cannot be read or written.
    """
    header, records = read_records(folder / RECORDS)
    with _told_of(folder / RECORDS):
        settings = Settings.from_json(header["settings"])
        items = [Item.from_json(one) for one in header["items"]]
        wanted = units_of(items, settings, header["outside_baseline"] is not None)
        left = {key_of(one.fields()) for one in wanted} - {key_of(one) for one in records}
    if left:
        raise ValueError(
            f"{folder / RECORDS} has {len(wanted) - len(left)} of {len(wanted)} records, allowed: "
            "all; the command that wrote them goes on where it has ended"
        )
    # All or none: what a damaged record lacks may be noticed by the last one.
    with _told_of(folder / RECORDS), TemporaryDirectory(dir=folder, prefix=".report-") as made:
        summary = write_files(Path(made), header, records)
        for file in Path(made).iterdir():
            file.replace(folder / file.name)
    return summary


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Have what records lack, or have in another form, told with the name of their file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or of another version of this program ({error!r}), allowed: "
            "records of this one"
        ) from error


def write_curve(path: Path, summary: Summary) -> None:
    """Write a line of figures for each rule and task as CSV, and one for the outside baseline; what
    is unknown is empty.

    Args:
        path: of the file.
        summary: what was found.
    """
    scores = list(dict.fromkeys(name for one in summary.outcomes for name in one.scores))
    rows = [_row(one, scores) for one in summary.outcomes]
    if summary.outside is not None:
        rows.append(_outside_row(summary))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _row(outcome: Outcome, scores: Sequence[str]) -> dict[str, Any]:
    point, batch = outcome.point, outcome.batch
    row: dict[str, Any] = {
        "task": outcome.task,
        "measure": outcome.measure,
        "kv_policy": outcome.kv_policy,
        "exit_layers": exits_name(outcome.exit_layers),
        "threshold": "full" if outcome.threshold is None else outcome.threshold,
    }
    for name in ("tokens_per_second", "speedup", "mean_exit_layer", "agreement", "identical"):
        row[name] = getattr(point, name, None)
        bounds = getattr(point, f"{name}_interval", None)
        if name in ("speedup", "agreement", "identical"):
            row[f"{name}_low"], row[f"{name}_high"] = bounds or (None, None)
    row["answer_perplexity"] = getattr(point, "perplexity", None)
    row["forced_agreement"] = outcome.forced_agreement
    row["held_out_perplexity"] = outcome.held_out_perplexity
    for name in scores:
        row |= _score_columns(name, outcome.scores.get(name))
    row["batch_tokens_per_second"] = getattr(batch, "tokens_per_second", None)
    row["batch_speedup"] = getattr(batch, "speedup", None)
    return row


def _score_columns(name: str, found: Estimate | None) -> dict[str, Any]:
    if found is None:
        return {name: None, f"{name}_p_value": None, f"{name}_adjusted_p_value": None}
    is_full = found.adjusted_p_value is None
    return {
        name: found.value,
        f"{name}_p_value": None if is_full else found.p_value,
        f"{name}_adjusted_p_value": found.adjusted_p_value,
    }


def _outside_row(summary: Summary) -> dict[str, Any]:
    found = summary.outside
    assert found is not None
    row: dict[str, Any] = {"task": ALL, "threshold": OUTSIDE, "speedup": found.speedup}
    row["speedup_low"], row["speedup_high"] = found.speedup_interval or (None, None)
    for name, both in (
        ("tokens_per_second", found.tokens_per_second),
        ("answer_perplexity", found.answer_perplexity),
        ("held_out_perplexity", found.held_out_perplexity),
    ):
        row[name] = None if both is None else both.outside
    row["forced_agreement"] = found.agreement
    row["batch_tokens_per_second"] = getattr(found.batch, "tokens_per_second", None)
    row["batch_speedup"] = getattr(found.batch, "speedup", None)
    return row
