"""Flags of Megatron that act only beside another one, and are refused without it.

Megatron takes them without a word, as it takes `--num-query-groups` without
`--group-query-attention`, and trains another model than the one that was asked for.
"""

from megatron.early_exit.training.cli.flag_rules.checkpoints import CHECKPOINTS
from megatron.early_exit.training.cli.flag_rules.logs import LOGS
from megatron.early_exit.training.cli.flag_rules.machine import MACHINE
from megatron.early_exit.training.cli.flag_rules.model import MODEL
from megatron.early_exit.training.cli.flag_rules.optimizer import OPTIMIZER
from megatron.early_exit.training.cli.flag_rules.parallelism import PARALLELISM
from megatron.early_exit.training.cli.flag_rules.precision import PRECISION

DEPENDENT = (*MODEL, *PRECISION, *OPTIMIZER, *PARALLELISM, *CHECKPOINTS, *LOGS, *MACHINE)
