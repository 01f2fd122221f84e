"""An evaluation from its settings to its files, which goes on where a killed one has ended."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.measurement import Measurement
from megatron.early_exit.evaluation.output import RECORDS, write_files
from megatron.early_exit.evaluation.outside_baseline import LeftOut, OutsideBaseline
from megatron.early_exit.evaluation.provenance import machine, software
from megatron.early_exit.evaluation.recording import Recording
from megatron.early_exit.evaluation.records import RecordFile
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.summary import Summary
from megatron.early_exit.evaluation.units import OUTSIDE, Unit
from megatron.early_exit.inference import EarlyExitEngine


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An engine, what is measured of it, and what its report says of where figures come from.

    Attributes:
        engine: of the model.
        items: the prompts.
        settings: what is measured.
        model: how the model was loaded, as JSON has it.
        outside: the same weights in another program, which is measured beside the full model;
            None measures no other.
        needs_outside: a failure of the other program ends the evaluation.
    """

    engine: EarlyExitEngine
    items: Sequence[Item]
    settings: Settings
    model: Mapping[str, Any]
    outside: OutsideBaseline | LeftOut | None = None
    needs_outside: bool = False

    def header(self) -> dict[str, Any]:
        """What all records have in common."""
        return {
            "model": {
                **self.model,
                "exit_layers": list(self.engine.exit_layers),
                "num_layers": self.engine.num_layers,
            },
            "settings": asdict(self.settings),
            "outside_baseline": None if self.outside is None else OUTSIDE,
            "machine": machine(self.engine.model.device),
            "software": software(),
            "items": [one.as_dict() for one in self.items],
        }

    def measurement(self) -> Measurement:
        """What measures, for which the prompts and the settings have been checked.

        Raises:
            ValueError: they do not suit the model.
        """
        return Measurement(self.engine, self.items, self.settings, self.outside, self.needs_outside)

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
            OutsideError: the outside baseline has failed, and is needed.
            OSError: a file cannot be written.
        """
        measurement = self.measurement()
        folder.mkdir(parents=True, exist_ok=True)
        header = self.header()
        file = RecordFile(folder / RECORDS, header)
        recording = Recording(measurement, file)
        for unit in progress([one for one in measurement.units() if not recording.has(one)]):
            recording.record(unit)
        return write_files(folder, header, file.records)
