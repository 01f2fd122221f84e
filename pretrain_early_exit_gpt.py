"""Pre-train a GPT with early exits. The command takes Megatron's flags and the flags of the exits.

    torchrun --nproc-per-node 2 pretrain_early_exit_gpt.py --pipeline-model-parallel-size 2 \
        --exit-layer-nums 3 6 ... (see README.md and examples/)
"""

import sys

from megatron.early_exit.errors import one_line
from megatron.early_exit.process_family import end_with_parent


def main() -> int:
    """Run the command line; returns the exit status."""
    # Not at the top of the file: the process that Megatron starts to collect a checkpoint's
    # writers imports this file, and would take seconds to import Megatron for nothing.
    from megatron.early_exit import platform

    machine = platform.prepare()

    from megatron.training import get_tokenizer, print_rank_0

    from megatron.early_exit.training.cli.command_line import (
        parse_arguments,
        refuse,
        run_as_one_process_without_launcher,
    )
    from megatron.early_exit.training.cli.misuse import explain
    from megatron.early_exit.training.resume.loading import CheckpointError
    from megatron.early_exit.training.session import Session, SetupError

    run_as_one_process_without_launcher()
    try:
        args = parse_arguments(
            lambda parser: platform.set_argument_defaults(parser, machine),
            lambda args: platform.check_arguments(args, machine),
        )
        session = Session(args, get_tokenizer())
        remark = platform.dtype_remark(args, machine) if args.rank == 0 else None
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        return refuse(message)
    print_rank_0(machine.describe())
    if remark is not None:
        print_rank_0(remark)
    try:
        session.run()
    except (CheckpointError, SetupError) as error:
        return refuse(one_line(error))
    return 0


if __name__ in ("__main__", "__mp_main__"):
    # A rank, or a process that it has started to collect what a checkpoint's writers say.
    end_with_parent()
if __name__ == "__main__":
    sys.exit(main())
