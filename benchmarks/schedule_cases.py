"""The steps that `pipeline_schedules.py` times: a model on two stages, and a step's list of
actions."""

from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.schedules.check import build_proved
from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.generators import FilledOneFOneB
from megatron.early_exit.schedules.schedule import Schedule

STAGES = 2


@dataclass(frozen=True)
class Case:
    """A model on two stages, and the fills of a step."""

    name: str
    exit_at_boundary: bool = False
    pre_exit: bool = False
    fills: tuple[int, int] = (0, 0)
    by_megatron: bool = False

    def exits(self, layers: int) -> EarlyExitConfig:
        """The exits of the model with this many layers on each stage."""
        if not self.exit_at_boundary:
            return EarlyExitConfig()
        return EarlyExitConfig(
            exit_layer_nums=(layers + self.pre_exit,), pre_exit=self.pre_exit, use_exit_norm=True
        )

    def schedule(self, microbatches: int) -> Schedule:
        """Of a step with so many full microbatches."""
        generator = FilledOneFOneB(
            num_ranks=STAGES,
            num_microbatches=microbatches,
            backward_forward_ratio=2.0,
            num_warmup_fills=self.fills[0],
            num_cooldown_fills=self.fills[1],
            exit_stages=frozenset({int(self.pre_exit)} if self.exit_at_boundary else ()),
        )
        return with_communication(build_proved(generator))


EXIT = Case("exit at the end of stage 1", exit_at_boundary=True)
CASES = (
    Case("1F1B, no exits"),
    Case("the same, Megatron's schedule", by_megatron=True),
    EXIT,
    Case("the same exit by --pre-exit", exit_at_boundary=True, pre_exit=True),
    Case("filled warm-up", exit_at_boundary=True, fills=(1, 0)),
    Case("filled cool-down", exit_at_boundary=True, fills=(0, 1)),
    Case("both filled", exit_at_boundary=True, fills=(1, 1)),
)
