"""TensorBoard's events across interruptions: neither holes nor steps that are there twice."""

from typing import Any

from megatron.early_exit.training.logging import Progress


class EventLog:
    """Megatron's TensorBoard writer.

    Args:
        writer: a `SummaryWriter`, or None on ranks that have none.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def start_after(self, iteration: int) -> None:
        """Mark what an interrupted run logged beyond `iteration` as out of date, for readers."""
        if self.writer is None:
            return
        # The writer marks a new file with this step, so let it open one.
        self.writer.close()
        self.writer.purge_step = iteration + 1

    def flush(self) -> None:
        """Put the events so far where they outlive the process."""
        if self.writer is not None:
            self.writer.flush()


class ProgressOnDisk(Progress):
    """A line of progress, and all events on disk before a checkpoint of the same iteration is.

    Args:
        events: the events.
        save_intervals: iterations between checkpoints, of each kind.
        options: arguments of `Progress`.
    """

    def __init__(self, events: EventLog, save_intervals: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        self.events = events
        self.save_intervals = save_intervals

    def report(self, iteration: int) -> None:
        """Called after each iteration has been logged and before it is saved."""
        super().report(iteration)
        if any(iteration % interval == 0 for interval in self.save_intervals):
            self.events.flush()
