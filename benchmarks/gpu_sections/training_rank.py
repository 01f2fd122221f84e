"""The process of `training.py` and `ee_tuning.py`: builds small models with exits by Megatron's
means, and writes down gradients, times, waits and the memory of parameters.

It takes Megatron's flags, and in environment variables what to do and the folder for the figures.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

# Before anything of Megatron's is imported: it prepares this process.
from training_worker import (  # noqa: E402
    MACHINE,
    WARM_UP_STEPS,
    Model,
    random_batches,
    synchronize,
)

# isort: split
import torch  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.rerun_state_machine import (  # noqa: E402
    RerunDataIterator,
    get_rerun_state_machine,
)
from megatron.training import get_tokenizer  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from gpu_sections.parameter_memory import parameter_memory  # noqa: E402
from megatron.early_exit import platform  # noqa: E402
from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.process_family import end_with_parent  # noqa: E402
from megatron.early_exit.training.cli.command_line import (  # noqa: E402
    parse_arguments,
    run_as_one_process_without_launcher,
)
from megatron.early_exit.training.session import Session  # noqa: E402

PARTS, FOLDER = "GPU_CHECK_PARTS", "GPU_CHECK_FOLDER"
"""Environment variables: what to measure, and where figures go."""


def set_weights(model: Model) -> None:
    """The same weights on every device."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for chunk in model.chunks:
            for _, parameter in sorted(chunk.named_parameters()):
                values = torch.ones(parameter.shape)
                if parameter.dim() > 1:
                    values = torch.randn(parameter.shape, generator=generator)
                    values *= parameter.shape[-1] ** -0.5
                parameter.copy_(values)


def gradients(args: Any, model: Model) -> dict[str, torch.Tensor]:
    """The gradients of one step, by the names of parameters."""
    set_weights(model)
    data = RerunDataIterator(random_batches(args))
    # Megatron checks losses only in passes that this has let begin.
    while get_rerun_state_machine().should_run_forward_backward(data):
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=model.session.forward_step,
            data_iterator=data,
            model=model.chunks,
            num_microbatches=args.global_batch_size // args.micro_batch_size,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
    return {
        name: parameter.main_grad.float().cpu().clone()
        for chunk in model.chunks
        for name, parameter in chunk.named_parameters()
    }


def times_and_waits(args: Any, models: dict[str, Model], steps: int) -> dict[str, Any]:
    """Seconds of steps that take turns; on a GPU also the synchronisations of a step."""
    from gpu_sections.waits import counted_waits

    data = RerunDataIterator(random_batches(args))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(WARM_UP_STEPS + steps):
        for name, model in models.items():
            synchronize()
            start = perf_counter()
            model.step(data)
            synchronize()
            if number >= WARM_UP_STEPS:
                seconds[name].append(perf_counter() - start)
    waits: dict[str, int] = {}
    if MACHINE.device == "cuda":
        for name, model in models.items():
            with counted_waits() as counts:
                model.step(data)
            waits[name] = counts.total()
    return {"seconds": seconds, "waits": waits}


def tuned_memory(args: Any, session: Session) -> dict[str, Any]:
    """Memory of each frozen and each tuned parameter, with the optimizer's states."""
    session.model_config.tunes_exits = True
    exits = replace(session.exits, use_exit_mlp=True, use_exit_norm=True)
    synchronize()
    before = torch.cuda.memory_allocated()
    model = Model(args, session, exits)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    # The optimizer takes memory for its states when it is first asked.
    model.optimizer.step()
    synchronize()
    found = parameter_memory(model.chunks, model.optimizer)
    found["allocated_bytes"] = torch.cuda.memory_allocated() - before
    return found


def main() -> None:
    """Do what the environment variables ask for."""
    run_as_one_process_without_launcher()
    args = parse_arguments(
        lambda parser: platform.set_argument_defaults(parser, MACHINE),
        lambda args: platform.check_arguments(args, MACHINE),
    )
    session = Session(args, get_tokenizer())
    initialize_megatron()
    args.curr_iteration = 0
    parts, folder = os.environ[PARTS].split(), Path(os.environ[FOLDER])
    figures: dict[str, Any] = {"device": MACHINE.device}
    if "tuning" in parts:
        figures["tuning"] = tuned_memory(args, session)
    else:
        models = {"early_exit": Model(args, session, session.exits)}
        torch.save(gradients(args, models["early_exit"]), folder / f"{MACHINE.device}.pt")
        if "times" in parts:
            models["standard"] = Model(args, session, EarlyExitConfig())
            figures |= times_and_waits(args, models, steps=int(os.environ["GPU_CHECK_STEPS"]))
    (folder / f"{MACHINE.device}.json").write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    end_with_parent()
    main()
