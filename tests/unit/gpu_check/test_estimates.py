"""The estimates of tools/gpu_check.py, and those in its documentation."""

from __future__ import annotations

import pytest

from tools import gpu_check

# The tool has put the folder of these on the path.
from gpu_sections import (  # isort: skip
    estimate,
)


def test_estimates_are_computed_from_bytes_and_launches(capsys):
    assert gpu_check.main(["--estimate", "--bandwidth", "2", "--launch-time", "10"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert len(rows) == 12
    for _, batch, context, weights, caches, least, before, *launches in rows:
        plain, plain_ms, graph, graph_ms = launches
        assert float(least) == pytest.approx((float(weights) + float(caches)) / 2, rel=0.01)
        assert float(plain_ms) == pytest.approx(float(plain) / 100, abs=0.006)
        assert float(graph_ms) == pytest.approx(float(graph) / 100, abs=0.006)
        # Attention read up to twice as many positions.
        twice = (float(weights) + 2 * float(caches)) / 2
        assert float(least) <= float(before) == pytest.approx(twice, rel=0.01)
        # The layers of a model launch most of its kernels.
        assert float(plain) > 10 * float(graph)
        assert int(batch) * int(context) > 0
    of_layer, others = estimate.counted_launches(2)
    assert of_layer > 5
    assert float(rows[2][7]) == pytest.approx(32 * of_layer + others, abs=0.6)


def test_bytes_and_times_in_the_documentation_are_those_of_the_program():
    """Launches may change with the engine; their columns are not compared."""
    text = (gpu_check.REPOSITORY / "docs" / "gpu.md").read_text()
    written = text.partition("<!-- estimates -->")[2].partition("<!-- end -->")[0]
    tables = []
    for table_text in (written, estimate.estimate_table(3.35, 5.0)):
        lines = [line for line in table_text.splitlines() if line.startswith("|")]
        tables.append([line.split(" | ")[:7] for line in lines])
    assert tables[0] == tables[1]
