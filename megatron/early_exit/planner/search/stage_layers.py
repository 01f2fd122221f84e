"""How many layers each stage of a pipeline gets: as many as others, or so that ranks take as long.

The embedding, the final head and exits take time, too, so that stages with as many layers as others
are not equally slow; and often the stages do not divide the layers.
"""

from collections.abc import Iterator
from itertools import accumulate

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.model_costs import PartSeconds

# Exits move to other stages as layers do: layers are given out again with the exits where they were
# last.
_ROUNDS = 2
_BISECTIONS = 40
_ROUNDING = 1 + 1e-9


def chunk_numbers(num_layers: int, num_ranks: int) -> list[int]:
    """Chunks that the layers of a rank can be cut into, with a layer or more in each: the divisors
    of the layers of a rank, or where these differ, of the fewest or the most."""
    fewest, most = num_layers // num_ranks, -(-num_layers // num_ranks)
    return [n for n in range(1, fewest + 1) if fewest % n == 0 or most % n == 0]


def stage_layers(
    parts: PartSeconds, exits: EarlyExitConfig, num_layers: int, num_ranks: int, num_chunks: int
) -> Iterator[tuple[int, ...]]:
    """Layers of each stage, in the order of the stages: the same of each if that is possible, and
    other numbers if the slowest rank is faster with them.

    Args:
        parts: what the parts of the model take.
        exits: of the model.
        num_layers: of the model, one for each stage or more.
        num_ranks: of the pipeline; stage s is on rank s modulo num_ranks.
        num_chunks: stages of each rank.
    """
    num_stages = num_ranks * num_chunks
    slowest_s = float("inf")
    if num_layers % num_stages == 0:
        even = (num_layers // num_stages,) * num_stages
        slowest_s = _slowest_s(parts, exits, even, num_ranks)
        yield even
    if num_ranks == 1:
        return
    balanced = _balanced(parts, exits, num_layers, num_ranks, num_chunks)
    if _slowest_s(parts, exits, balanced, num_ranks) < slowest_s:
        yield balanced


def _balanced(
    parts: PartSeconds, exits: EarlyExitConfig, num_layers: int, num_ranks: int, num_chunks: int
) -> tuple[int, ...]:
    num_stages = num_ranks * num_chunks
    found = [_give_out(parts.layer_s, _around_s(parts, (), num_stages), num_layers, num_ranks)]
    if exits.positions:
        for _ in range(_ROUNDS):
            around_s = _around_s(parts, exits.stages(found[-1]), num_stages)
            found.append(_give_out(parts.layer_s, around_s, num_layers, num_ranks))
        found.append(_cut(_layer_seconds(parts, exits, num_layers), num_stages))
    return min(found, key=lambda layers: _slowest_s(parts, exits, layers, num_ranks))


def _cut(layer_s: list[float], num_stages: int) -> tuple[int, ...]:
    """Cut layers that take these times into stages of which the slowest is as fast as possible.

    From the last stage on, each gets as close to its share of what is left as leaves layers for the
    stages before it, and no more of them than these can take.
    """
    before_s = [0.0, *accumulate(layer_s)]
    low, high = max(layer_s), before_s[-1]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _least_stages(layer_s, middle)[-1] <= num_stages:
            high = middle
        else:
            low = middle
    needed = _least_stages(layer_s, high)
    # Sums of the same layers differ by rounding.
    most_s = high * _ROUNDING**2
    layers, end = [], len(layer_s)
    for left in range(num_stages - 1, 0, -1):
        share_s = before_s[end] / (left + 1)
        begins = [
            begin
            for begin in range(left, end)
            if needed[begin] <= left and before_s[end] - before_s[begin] <= most_s
        ]
        begin = min(begins, key=lambda one: abs(before_s[end] - before_s[one] - share_s))
        layers.append(end - begin)
        end = begin
    return (end, *reversed(layers))


def _least_stages(layer_s: list[float], most_s: float) -> list[int]:
    """How many stages of at most so many seconds the first layers need, by their number."""
    needed, stage_s = [0], 0.0
    for one_s in layer_s:
        is_new = not needed[-1] or stage_s + one_s > most_s * _ROUNDING
        stage_s = one_s if is_new else stage_s + one_s
        needed.append(needed[-1] + is_new)
    return needed


def _layer_seconds(parts: PartSeconds, exits: EarlyExitConfig, num_layers: int) -> list[float]:
    """What each layer takes with what is beside it, as a stage of its own would."""
    around_s = _around_s(parts, exits.stages((1,) * num_layers), num_layers)
    return [parts.layer_s + more for more in around_s]


def _give_out(
    layer_s: float, around_s: list[float], num_layers: int, num_ranks: int
) -> tuple[int, ...]:
    """Give each layer to the rank that has the least to do, and there to such a stage. For layers
    that take the same time no other way makes the slowest rank faster. Of equals the last is taken:
    the first ranks keep the activations of more microbatches."""
    layers = [1] * len(around_s)
    rank_s = [sum(around_s[rank::num_ranks]) for rank in range(num_ranks)]
    for _ in range(num_layers - len(layers)):
        rank = min(reversed(range(num_ranks)), key=rank_s.__getitem__)
        own = reversed(range(rank, len(layers), num_ranks))
        stage = min(own, key=lambda one: layers[one] * layer_s + around_s[one])
        layers[stage] += 1
        rank_s[rank] += layer_s
    return tuple(layers)


def _around_s(parts: PartSeconds, exit_stages: tuple[int, ...], num_stages: int) -> list[float]:
    """What each stage takes beside its layers."""
    around_s = [0.0] * num_stages
    around_s[0] += parts.embedding_s
    around_s[-1] += parts.head_s
    for stage in exit_stages:
        around_s[stage] += parts.exit_s
    return around_s


def _slowest_s(
    parts: PartSeconds, exits: EarlyExitConfig, layers: tuple[int, ...], num_ranks: int
) -> float:
    around_s = _around_s(parts, exits.stages(layers), len(layers))
    stage_s = [number * parts.layer_s + more for number, more in zip(layers, around_s, strict=True)]
    return max(sum(stage_s[rank::num_ranks]) for rank in range(num_ranks))
