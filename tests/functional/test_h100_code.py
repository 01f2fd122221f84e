"""The code of decoding steps for an H100, made without one: it cannot rot unseen."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.large_shapes import LLAMA_3_1_8B

pytest.importorskip("triton", reason="torch comes without Triton on this platform")

PRODUCTS = 4
"""Of a layer: queries, keys and values; the attention's projection; two of the MLP."""
OTHERS = 5
"""Kernels of a layer around them: two norms, the turns of queries and of keys, the activation."""
LAYERS = 2


ROWS = (1, 8)


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict[str, Any]]:
    """What the code for each number of rows consists of; one process compiles all."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.pretended_h100", *map(str, ROWS)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()[-len(ROWS) :]
    return dict(zip(ROWS, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("rows", ROWS)
def test_a_layer_is_few_kernels(compiled, rows):
    found = compiled[rows]
    assert found["attentions"] == LAYERS
    assert found["kernels"] + found["products"] <= LAYERS * (PRODUCTS + OTHERS)
    assert found["products"] in (0, LAYERS * PRODUCTS)
    # Nothing is as large as a cache: none is copied.
    assert found["largest_buffer"] == rows * 2 * LLAMA_3_1_8B.ffn_hidden_size
    assert len(found["machine_code"]) >= OTHERS - 1
    assert all(size > 1000 for size in found["machine_code"].values())
