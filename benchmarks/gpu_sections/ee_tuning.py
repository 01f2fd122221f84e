"""The memory of EE-Tuning: what is kept for each frozen and for each tuned parameter."""

import tempfile
from pathlib import Path

from gpu_sections.findings import SectionReport
from gpu_sections.sizes import Sizes
from gpu_sections.training import run_rank

# In fp32: a weight alone, and one with its gradient and Adam's two moments.
FROZEN_BYTES, TUNED_BYTES = 4, 16
ROUNDING = 1.05
"""What an allocator may take on top, because it gives out memory in blocks."""


def check_ee_tuning(report: SectionReport, sizes: Sizes) -> None:
    """Count bytes tensor by tensor, and compare them with what the device has given out."""
    with tempfile.TemporaryDirectory() as name:
        figures = run_rank(sizes, Path(name) / "rank", "tuning", on_gpu=sizes.on_gpu)["tuning"]
    for kind, expected in (("frozen", FROZEN_BYTES), ("tuned", TUNED_BYTES)):
        number, size = figures[kind]["parameters"], figures[kind]["bytes"]
        each = size / max(number, 1)
        report.check(
            f"bytes per {kind} parameter, in fp32",
            f"{each:.2f}, of {number} parameters",
            f"{expected}",
            number > 0 and abs(each - expected) < 0.01 * expected,
            bytes_of_each=each,
            parameters=number,
        )
    counted = figures["frozen"]["bytes"] + figures["tuned"]["bytes"]
    allocated = figures["allocated_bytes"]
    report.check(
        "memory given out over that of parameters",
        f"{allocated / counted:.3f}",
        f"{ROUNDING} or less",
        counted <= allocated <= ROUNDING * counted,
        gpu_only="the host's allocator does not say",
        allocated_bytes=allocated,
        counted_bytes=counted,
    )
