"""Estimates of a step of decoding on a GPU that nobody has measured: bytes and kernel launches."""

from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from itertools import product

from gpu_sections.sizes import LLAMA_2_7B, LLAMA_7B
from gpu_sections.step_limits import cache_bytes, weight_bytes

BATCHES, CONTEXTS = (1, 8, 64), (128, 4096)
MODELS = {"grouped keys and values (Mistral 7B)": LLAMA_7B, "Llama 2 7B": LLAMA_2_7B}
_ITEMSIZE = 2
_STEPS = 8
_COUNTED_LAYERS = (2, 4)

_FEWEST_POSITIONS = 128

Launches = tuple[float, float]
"""Kernels of a step: in each layer, and beside the layers."""


def counted_launches(rows: int, is_captured: bool = False) -> Launches:
    """Kernels that are launched in a greedy step, counted on a pretended GPU.

    Their number does not depend on the sizes of matrices, so tiny models of two depths tell those
    of a layer from the others.

    Args:
        rows: sequences at a time.
        is_captured: layers are captured as graphs, each of which is launched as one.
    """
    pretended = import_module("tests.helpers.pretended_cuda")
    tiny = import_module("tests.helpers.tiny_models")
    params = import_module("megatron.early_exit.inference").SamplingParams(
        max_tokens=_STEPS + 8, ignore_eos=True
    )
    counts = []
    for layers in _COUNTED_LAYERS:
        model = tiny.make_model(replace(tiny.LLAMA, num_layers=layers))
        with pretended.PretendedCuda() as cuda, ExitStack() as stack:
            if is_captured:
                stack.enter_context(pretended.pretended_recorder(cuda))
            engine = pretended.pretended_engine(model, is_captured, max_batch_size=rows)
            for row in range(rows):
                engine.submit([1 + row % 50] * 3, params)
            for _ in range(4):
                engine.step()
            cuda.reset()
            for _ in range(_STEPS):
                engine.step()
            counts.append(cuda.launches.total() / _STEPS)
    few, many = _COUNTED_LAYERS
    of_layer = (counts[1] - counts[0]) / (many - few)
    return of_layer, counts[0] - few * of_layer


def rounded_up(context: int) -> int:
    """Positions that attention read before it took lengths from the device: for one more than
    `context`, the next power of two."""
    return max(1 << context.bit_length(), _FEWEST_POSITIONS)


def estimate_table(bandwidth: float, launch_us: float) -> str:
    """Estimates as a Markdown table.

    Args:
        bandwidth: of the memory, in TB/s.
        launch_us: microseconds to launch a kernel or a graph.
    """
    lines = [
        f"Estimates for bf16 and {bandwidth:g} TB/s, with {launch_us:g} microseconds per launch; "
        "not measured.",
        "",
        "| model | batch | context | weights, GB | keys and values, GB | least time, ms | "
        "least time before, ms | launches, plain layers | their time, ms | launches, captured "
        "layers | their time, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {rows: counted_launches(rows) for rows in BATCHES}
    captured = {rows: counted_launches(rows, is_captured=True) for rows in BATCHES}
    for (name, shape), rows, context in product(MODELS.items(), BATCHES, CONTEXTS):
        layers = shape.num_layers
        weights = weight_bytes(shape, layers, _ITEMSIZE)
        caches, before = (
            cache_bytes(shape, layers, _ITEMSIZE, rows * positions)
            for positions in (context, rounded_up(context))
        )
        cells = [
            name,
            str(rows),
            str(context),
            f"{weights / 1e9:.1f}",
            f"{caches / 1e9:.2f}",
            f"{(weights + caches) / bandwidth / 1e9:.2f}",
            f"{(weights + before) / bandwidth / 1e9:.2f}",
        ]
        for of_layer, others in (plain[rows], captured[rows]):
            launches = layers * of_layer + others
            cells += [f"{launches:.0f}", f"{launches * launch_us / 1e3:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
