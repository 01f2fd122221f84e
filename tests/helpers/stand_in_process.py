"""Calls functions where Transformer Engine seems to be installed: in processes of their own, so
that no other test sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.speed import patient

_ROOT = Path(__file__).parents[2]
_STAND_IN = Path(__file__).with_name("transformer_engine_stand_in")


def under_transformer_engine(function: Callable[[], Any]) -> Any:
    """What `function`, which is at the top level of its module, returns there; it must be JSON."""
    module, name = function.__module__, function.__name__
    program = f"import json; from {module} import {name}; print(json.dumps({name}()))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (_STAND_IN, _ROOT)))},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
