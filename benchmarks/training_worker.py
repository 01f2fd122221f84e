"""One rank of `training_overhead.py`: trains the standard and the early-exit model alternately.

Megatron's builder, data parallelism, optimizer and training step, called as `pretrain` calls them,
but for two models in one process. Measures the time of a step and the peak memory.
"""

import copy
import dataclasses
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.early_exit import platform
from megatron.early_exit.process_family import end_with_parent

MACHINE = platform.prepare()

import torch  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.training import get_tokenizer  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.training import (  # noqa: E402
    get_megatron_ddp_config,
    get_megatron_optimizer_config,
    get_optimizer_param_scheduler,
    num_floating_point_operations,
    train_step,
)
from megatron.training.vocab_utils import calculate_padded_vocab_size  # noqa: E402

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.cli.command_line import parse_arguments  # noqa: E402
from megatron.early_exit.training.session import Session  # noqa: E402

WARM_UP_STEPS = 2


class Model:
    """One model with its optimizer."""

    def __init__(self, args: Namespace, session: Session, exits: EarlyExitConfig) -> None:
        transformer = copy.copy(session.model_config.transformer)
        config = dataclasses.replace(
            session.model_config,
            transformer=transformer,
            early_exit=exits,
            pre_wrap_hooks=[self._attach],
        )
        self.session, self.args = session, args
        groups = ProcessGroupCollection.use_mpu_process_groups()
        builder = config.get_builder_cls()(config)
        ddp = get_megatron_ddp_config(args)
        self.chunks = builder.build_distributed_models(groups, ddp_config=ddp)
        # Its annotation forgets the second value.
        optimizer_config, overrides = cast(Any, get_megatron_optimizer_config(args))
        self.optimizer = get_megatron_optimizer(
            optimizer_config, self.chunks, config_overrides=overrides
        )
        self.scheduler = get_optimizer_param_scheduler(self.optimizer)
        self.config = transformer
        self.config.grad_scale_func = self.optimizer.scale_loss

    def _attach(self, chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            chunk.exit_tap = self.session.objective
        return chunks

    def step(self, data: Any) -> None:
        """One optimizer step, as Megatron's training loop does it."""
        train_step(
            self.session.forward_step,
            data,
            self.chunks,
            self.optimizer,
            self.scheduler,
            self.config,
            get_forward_backward_func(),
            iteration=0,
        )


def random_batches(args: Namespace) -> Any:
    """Microbatches of random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.micro_batch_size, args.seq_length + 1)
    positions = torch.arange(args.seq_length).expand(args.micro_batch_size, -1)
    while True:
        tokens = torch.randint(args.vocab_size - 1, shape, generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(args.micro_batch_size, args.seq_length),
            "position_ids": positions.contiguous(),
        }


def flops(args: Namespace, exits: EarlyExitConfig) -> dict[str, float]:
    """Floating-point operations of a step: Megatron's count, and the exits' projections on top.

    Raises:
        SystemExit: an exit has more than a norm and a projection.
    """
    if exits.use_exit_mlp or exits.use_exit_block:
        raise SystemExit("error: --use-exit-mlp and --use-exit-block are not counted here")
    standard = float(num_floating_point_operations(args, args.global_batch_size))
    vocab = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    tokens = args.global_batch_size * args.seq_length
    heads = 6.0 * tokens * args.hidden_size * vocab * len(exits.positions)
    return {"standard": standard, "early_exit": standard + heads}


def peak_bytes() -> int:
    """The peak memory on the device of the model."""
    if MACHINE.device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def synchronize() -> None:
    """Wait for the device and for the other ranks."""
    torch.cuda.synchronize()
    torch.distributed.barrier()


def main() -> None:
    """Run the steps and write the figures of this rank."""
    args = parse_arguments(
        lambda parser: platform.set_argument_defaults(parser, MACHINE),
        lambda args: platform.check_arguments(args, MACHINE),
    )
    session = Session(args, get_tokenizer())
    initialize_megatron()
    args.curr_iteration = 0
    which, steps = os.environ["OVERHEAD_MODEL"], int(os.environ["OVERHEAD_STEPS"])
    options = {"standard": EarlyExitConfig(), "early_exit": session.exits}
    names = list(options) if which == "both" else [which]
    libraries = _status("VmRSS") if MACHINE.device == "cpu" else 0
    models = {name: Model(args, session, options[name]) for name in names}
    data = RerunDataIterator(random_batches(args))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(WARM_UP_STEPS + steps):
        for name, model in models.items():
            synchronize()
            start = time.perf_counter()
            model.step(data)
            synchronize()
            if step >= WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    device = (
        torch.cuda.get_device_name() if MACHINE.device == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    figures = {
        **seconds,
        "flops": flops(args, session.exits),
        "peak_bytes": peak_bytes() - libraries,
        "device": device,
    }
    rank = torch.distributed.get_rank()
    Path(os.environ["OVERHEAD_OUTPUT"], f"rank{rank}.json").write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    end_with_parent()
    main()
