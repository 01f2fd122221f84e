"""A schedule as a grid of text: a row for each rank, a column for each step of the lists."""

from megatron.early_exit.pipeline.schedule import Schedule


def draw_grid(
    schedule: Schedule, marks: frozenset[tuple[int, int]] = frozenset(), margin: int | None = None
) -> str:
    """Draw the lists, with marked steps between angle brackets.

    Args:
        schedule: what to draw.
        marks: (rank, position in its list) of each marked step.
        margin: draw so many steps left and right of the marked ones; None for all steps.
    """
    longest = max(len(rank) for rank in schedule.ranks)
    first, end = 0, longest
    if margin is not None and marks:
        first = max(min(at for _, at in marks) - margin, 0)
        end = min(max(at for _, at in marks) + margin + 1, longest)
    rows = [["step", *(f"{at} " for at in range(first, end))]]
    for rank, actions in enumerate(schedule.ranks):
        row = [f"rank {rank}"]
        for at in range(first, end):
            cell = str(actions[at]) if at < len(actions) else ""
            row.append(f">{cell}<" if (rank, at) in marks else f"{cell} ")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
