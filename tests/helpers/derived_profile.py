"""Profiles of a machine that is exactly as fast as its data sheet says."""

from typing import get_args

from megatron.early_exit.planner.command_line.model_flags import read_model
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.layer_profile import MEASURED_SIZES, LayerProfile, Part
from megatron.early_exit.planner.costs.part_times import HardwareTimes
from tools.plan_pipeline import build_parser

# Padding for tensor parallelism leaves this vocabulary as it is.
MODEL = (
    "--num-layers 12 --hidden-size 1024 --num-attention-heads 16 --vocab-size 32768 "
    "--seq-length 1024 --exit-layer-nums 3 6 --use-exit-block"
)
PLANNED = f"{MODEL} --global-batch-size 64 --gpus 8 --memory-gb 8 --top 4"
A100 = ACCELERATORS["a100-80gb"]


def derived_times(words: str = PLANNED) -> HardwareTimes:
    """Times of the parts of the model that a planner's flags describe, on an A100."""
    model = read_model(build_parser().parse_args(words.split()))
    return HardwareTimes(model.shape, model.placements[0], A100)


def derived_profile(
    sizes: tuple[int, ...], factor: float = 1.0, words: str = PLANNED
) -> LayerProfile:
    """The profile that an A100 would give, or one whose times are longer by a factor."""
    times = derived_times(words)

    def seconds(part: Part, size: int) -> dict[str, float]:
        time = times.time(part, size)
        return {"forward": factor * time.forward_s, "backward": factor * time.backward_s}

    return LayerProfile(
        machine="a machine",
        dtype="bf16",
        shape={name: getattr(times.shape, name) for name in MEASURED_SIZES},
        exit_heads=times.exits.head_flags,
        seconds_by_size={
            size: {part: seconds(part, size) for part in get_args(Part)} for size in sizes
        },
    )
