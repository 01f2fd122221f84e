"""Pre-train a GPT with early exits. Takes every flag of Megatron's and those of the exits.

    torchrun --nproc-per-node 2 pretrain_early_exit_gpt.py --pipeline-model-parallel-size 2 \
        --exit-layer-nums 3 6 ... (see README.md and examples/)
"""

import os
import sys
from argparse import ArgumentParser

from megatron.early_exit import platform

MACHINE = platform.prepare()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron.early_exit.training.arguments import add_early_exit_arguments  # noqa: E402
from megatron.early_exit.training.session import Session, parse_arguments  # noqa: E402


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    platform.set_argument_defaults(parser, MACHINE)
    return add_early_exit_arguments(parser)


def main() -> int:
    try:
        args = parse_arguments(add_arguments)
        platform.check_arguments(args, MACHINE)
        session = Session(args, get_tokenizer())
    except (ValueError, AssertionError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error or 'the arguments are not valid'}", file=sys.stderr)
        return 2
    print_rank_0(MACHINE.describe())
    pretrain(
        pretrain_cfg_container_from_args(args, session.model_config),
        session.datasets,
        ModelType.encoder_or_decoder,
        session.forward_step,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
