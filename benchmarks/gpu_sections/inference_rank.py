"""One process of `two_gpus.py`: its part of a small model generates greedy texts.

    torchrun --nproc-per-node 2 benchmarks/gpu_sections/inference_rank.py --layout pipeline \\
        --device cpu --output tokens.json
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS)]

from gpu_sections.models import (  # noqa: E402
    exits_at_quarter_and_half,
    random_prompt,
    random_weights,
)
from gpu_sections.sizes import sizes_for  # noqa: E402
from megatron.early_exit.checkpoint.architecture import Architecture  # noqa: E402
from megatron.early_exit.inference import (  # noqa: E402
    EarlyExitEngine,
    GenerationResult,
    SamplingParams,
)
from megatron.early_exit.inference.distributed.parallel_backend import (  # noqa: E402
    parallel_model,
)
from megatron.early_exit.inference.distributed.process_groups import join, own_part  # noqa: E402
from megatron.early_exit.inference.model.segmented_model import SegmentedModel  # noqa: E402
from megatron.early_exit.process_family import end_with_parent  # noqa: E402

RANKS = 2
_PROMPT, _ROWS, _TOKENS = 20, 4, 24


def divided_model(device: torch.device) -> Architecture:
    """The model that is divided, whose matrices two ranks can share."""
    shape = sizes_for(device).model
    return replace(shape, vocab_size=shape.vocab_size // RANKS * RANKS)


def texts(engine: EarlyExitEngine, shape: Architecture) -> list[GenerationResult]:
    """Results of rows in different modes, with two log-probabilities for each token."""
    full = SamplingParams(max_tokens=_TOKENS, ignore_eos=True, logprobs=2)
    params = [
        full,
        replace(full, mode="early_exit", early_exit_threshold=0.0),
        replace(full, mode="early_exit", early_exit_threshold=0.1),
    ]
    prompts = [random_prompt(shape, _PROMPT, seed) for seed in range(_ROWS)]
    return engine.generate(prompts, [params[n % len(params)] for n in range(_ROWS)])


def whole_engine(device: torch.device) -> EarlyExitEngine:
    """The same model in one process, in fp32, with plain layers."""
    shape = divided_model(device)
    exits = exits_at_quarter_and_half(shape)
    weights = random_weights(shape, exits, torch.device("cpu"), torch.float32)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    model = SegmentedModel(shape, exits, weights)
    return EarlyExitEngine(model, max_batch_size=_ROWS, max_sequence_length=64)


def divided_engine(layout: str, device_type: str, compile_rows: bool) -> EarlyExitEngine:
    """This process's part of the model."""
    layouts = {"tensor": (RANKS, 1), "pipeline": (1, RANKS)}
    rank, device = join(*layouts[layout], "cpu" if device_type == "cpu" else None)
    shape = divided_model(device)
    exits = exits_at_quarter_and_half(shape)
    parts = {}
    for name, whole in random_weights(shape, exits, torch.device("cpu"), torch.float32).items():
        part = own_part(rank, shape, exits, name, whole)
        if part is not None:
            parts[name] = part.to(device)
    model, backend = parallel_model(rank, shape, exits, parts, compile_rows)
    return EarlyExitEngine(model, max_batch_size=_ROWS, max_sequence_length=64, backend=backend)


def main() -> None:
    """Generate; the first rank writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=("tensor", "pipeline"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--compile", action="store_true", help="with CUDA graphs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    engine = divided_engine(args.layout, args.device, args.compile)
    shape = divided_model(torch.device(args.device))
    results = texts(engine, shape)
    engine.close()
    if int(os.environ["RANK"]) == 0:
        fields = ("token_ids", "logprobs", "exit_layers")
        rows = [{name: list(getattr(one, name)) for name in fields} for one in results]
        args.output.write_text(json.dumps(rows))
    distributed.destroy_process_group()


if __name__ == "__main__":
    end_with_parent()
    main()
