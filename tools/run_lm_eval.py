"""EleutherAI's lm-evaluation-harness on a model with exits, in this process:

    python tools/run_lm_eval.py --model early_exit --tasks hellaswag \\
        --model_args load=checkpoint,early_exit_threshold=0.8,kv_policy=propagate

takes the harness's own command line (`--help`), and knows one model more. Without a threshold it is
the full model. `--model_args` also takes dtype, weight_dtype, compile, exit_layers (4+8),
exit_measure, max_batch_size, and, under torchrun, tensor_parallel and pipeline_parallel. The
harness's tasks may have to fetch their data."""

from __future__ import annotations

import sys

from megatron.early_exit.errors import one_line
from megatron.early_exit.process_family import end_with_parent


def main() -> int:
    """Run the harness; returns the exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import megatron.early_exit.evaluation.lm_eval_model  # noqa: F401
    except ImportError as error:
        print(f"error: lm-eval is needed ({error}): pip install lm-eval", file=sys.stderr)
        return 2
    try:
        cli_evaluate()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
