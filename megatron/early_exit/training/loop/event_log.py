"""TensorBoard's events across interruptions.

A writer keeps events in memory for up to two minutes, so a run that is killed would leave a hole
before the checkpoint that the next one starts from. What it logged beyond the checkpoint is logged
again, with the same values.
"""

from typing import Any

from megatron.early_exit.training.loop.progress import Progress


class ProgressOnDisk(Progress):
    """A line of progress, and all events on disk before a checkpoint of the same iteration is.

    Args:
        writer: Megatron's `SummaryWriter`, or None on ranks that have none.
        save_intervals: iterations between checkpoints, of each kind.
        options: arguments of `Progress`.
    """

    def __init__(self, writer: Any, save_intervals: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        self.writer = writer
        self.save_intervals = save_intervals

    def report(self, iteration: int) -> None:
        """Called after each iteration has been logged and before it is saved."""
        super().report(iteration)
        if any(iteration % interval == 0 for interval in self.save_intervals):
            self.flush()

    def flush(self) -> None:
        """Put the events so far where they outlive the process."""
        if self.writer is not None:
            self.writer.flush()
