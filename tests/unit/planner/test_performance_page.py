"""What docs/performance.md says that exits cost is what its commands print."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tools import plan_pipeline

PAGE = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
(COMMANDS,) = re.findall(r"^```bash\n(plan\(\).*?)^```", PAGE, re.MULTILINE | re.DOTALL)
POINTS = 1.0


def commands() -> list[list[str]]:
    """The planner's flags, command by command, as the shell reads them."""
    program = ".venv/bin/python tools/plan_pipeline.py"
    assert program in COMMANDS
    shown = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", COMMANDS.replace(program, "echo")],
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in shown.stdout.splitlines()]


def test_exits_cost_what_the_table_says(capsys):
    seconds = []
    for flags in commands():
        assert plan_pipeline.main([*flags, "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["plans"][0]["step_s"])
    costs = []
    for begin in range(0, len(seconds), 3):
        plain, *with_exits = seconds[begin : begin + 3]
        costs.append([100 * (one / plain - 1) for one in with_exits])
    (small, short_small), (plain_pipeline, _), (chunks, short_chunks) = costs
    rows = re.findall(r"\| about ([\d.]+) % \| planner, below \|", PAGE)
    found = [plain_pipeline, chunks, short_chunks, small, short_small]
    assert [float(one) for one in rows] == pytest.approx(found, abs=POINTS)
