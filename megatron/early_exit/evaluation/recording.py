"""Records of units of work, each of which is measured once."""

from collections.abc import Sequence

from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.measurement import Measurement
from megatron.early_exit.evaluation.records import Record, RecordFile
from megatron.early_exit.evaluation.rule import FULL
from megatron.early_exit.evaluation.units import Unit, key_of


class Recording:
    """Measures what a file of records lacks, so that what was killed goes on.

    Args:
        measurement: of the model.
        file: has what was measured, and gets what is.
    """

    def __init__(self, measurement: Measurement, file: RecordFile) -> None:
        self._measurement, self._file = measurement, file
        self._found = {key_of(one): one for one in file.records}
        self._full = {
            one["index"]: one
            for one in file.records
            if one["kind"] == "answer" and one["threshold"] is None
        }
        self._is_warm = False

    @property
    def items(self) -> Sequence[Item]:
        """The prompts that are measured."""
        return self._measurement.items

    def has(self, unit: Unit) -> bool:
        """Whether the unit's record is there."""
        return key_of(unit.fields()) in self._found

    def record(self, unit: Unit) -> Record:
        """The record of a unit, which is measured if it is not there; of an answer by a rule, that
        of the full model has to be there.

        Raises:
            FloatingPointError: logits are not finite.
            OSError: the file cannot be written.
        """
        key = key_of(unit.fields())
        if key in self._found:
            return self._found[key]
        if not self._is_warm:
            self._measurement.warm_up()
            self._is_warm = True
        record = self._measurement.measure(unit, self._full)
        self._file.append(record)
        self._found[key] = record
        if unit.kind == "answer" and unit.rule == FULL:
            self._full[unit.index] = record
        return record
