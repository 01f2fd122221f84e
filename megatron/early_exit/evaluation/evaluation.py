"""An evaluation from its settings to its files, which goes on where a killed one has ended."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.early_exit.evaluation.figures import figures_of, save
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.measurement import Measurement, Unit
from megatron.early_exit.evaluation.provenance import machine, software
from megatron.early_exit.evaluation.records import Record, RecordFile
from megatron.early_exit.evaluation.report import write_report
from megatron.early_exit.evaluation.rule import FULL
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.summary import Outcome, Summary, summarize
from megatron.early_exit.inference import EarlyExitEngine

RECORDS, RESULTS, CURVE, REPORT = "records.jsonl", "results.json", "curve.csv", "report.html"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An engine, what is measured of it, and what its report says of where figures come from.

    Attributes:
        engine: of the model.
        items: the prompts.
        settings: what is measured.
        model: how the model was loaded, as JSON has it.
    """

    engine: EarlyExitEngine
    items: Sequence[Item]
    settings: Settings
    model: Mapping[str, Any]

    def header(self) -> dict[str, Any]:
        """What all records have in common."""
        return {
            "model": {
                **self.model,
                "exit_layers": list(self.engine.exit_layers),
                "num_layers": self.engine.num_layers,
            },
            "settings": asdict(self.settings),
            "machine": machine(self.engine.model.device),
            "software": software(),
            "items": [one.as_dict() for one in self.items],
        }

    def run(
        self, folder: Path, progress: Callable[[Iterable[Unit]], Iterable[Unit]] = tqdm
    ) -> Summary:
        """Measure what is not in the folder's records yet, and write all files.

        Args:
            folder: for the files; it is made where it is missing.
            progress: shows how far the units are that are to be measured.

        Raises:
            ValueError: the folder has records of another measurement, or prompts do not suit the
                model.
            FloatingPointError: logits are not finite.
            OSError: a file cannot be written.
        """
        measurement = Measurement(self.engine, self.items, self.settings)
        folder.mkdir(parents=True, exist_ok=True)
        header = self.header()
        file = RecordFile(folder / RECORDS, header)
        done = {_key(one) for one in file.records}
        full = {
            one["index"]: one
            for one in file.records
            if one["kind"] == "answer" and one["threshold"] is None
        }
        left = [unit for unit in measurement.units() if _key(unit.fields()) not in done]
        if left:
            measurement.warm_up()
        for unit in progress(left):
            record = measurement.measure(unit, full)
            file.append(record)
            if unit.kind == "answer" and unit.rule == FULL:
                full[unit.index] = record
        summary = summarize(file.records, [one.task for one in self.items], self.settings.seed)
        self._write(folder, header, file.records, summary)
        return summary

    def _write(
        self, folder: Path, header: Mapping[str, Any], records: Sequence[Record], summary: Summary
    ) -> None:
        results = {**header, **summary.as_dict(), "records": records}
        (folder / RESULTS).write_text(json.dumps(results, allow_nan=False) + "\n")
        write_curve(folder / CURVE, summary.outcomes)
        figures = figures_of(summary, self.engine.num_layers)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
        write_report(folder / REPORT, header, records, summary, figures)


def _key(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(fields[name] for name in ("kind", "index", "threshold", "kv_policy", "measure"))


def write_curve(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write a line of figures for each rule and task as CSV; what is unknown is empty.

    Args:
        path: of the file.
        outcomes: what was found.
    """
    scores = list(dict.fromkeys(name for one in outcomes for name in one.scores))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for one in outcomes:
            row = _row(one, scores)
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def _row(outcome: Outcome, scores: Sequence[str]) -> dict[str, Any]:
    point, batch = outcome.point, outcome.batch
    row: dict[str, Any] = {
        "task": outcome.task,
        "measure": outcome.measure,
        "kv_policy": outcome.kv_policy,
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
    row |= {name: outcome.scores[name].value if name in outcome.scores else None for name in scores}
    row["batch_tokens_per_second"] = getattr(batch, "tokens_per_second", None)
    row["batch_speedup"] = getattr(batch, "speedup", None)
    return row
