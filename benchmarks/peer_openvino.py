"""OpenVINO GenAI in a process of its own, with an interpreter of its own.

Its packages are no dependency of this project, so they have an environment of their own. This file
is run by both interpreters, and imports nothing but the standard library before it knows by which.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_IMPORTED_WITHIN = 120.0
_ENDS_WITHIN = 10.0
"""Seconds that it may take to end before it is killed."""


def missing_reason(python: Path | None) -> str | None:
    """Why an interpreter cannot run OpenVINO GenAI; None if it can."""
    allowed = "allowed: an interpreter of an environment with `pip install openvino-genai`"
    if python is None:
        return f"--openvino-python is not given, {allowed}"
    command = [str(python), "-c", "import openvino_genai"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORTED_WITHIN)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"--openvino-python {python} cannot be run ({error}), {allowed}"
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return f"--openvino-python {python} cannot import openvino_genai ({last}), {allowed}"
    return None


class OpenVino:
    """OpenVINO GenAI with a file.

    Args:
        python: its interpreter.
        path: the model, a GGUF file.
        precision: in which it computes, "f32" or "bf16".
        threads: that it computes with.
        clock: by which it is timed, one of `CLOCKS`.

    Raises:
        SystemExit: it cannot load the model.
    """

    def __init__(self, python: Path, path: Path, precision: str, threads: int, clock: str) -> None:
        words = [str(python), "-W", "ignore", __file__, str(path), precision, str(threads), clock]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._receive()

    def seconds_per_token(self, prompts: list[list[int]], num_tokens: int) -> float:
        """How long it takes to answer prompts of one length with some tokens each, greedily."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([prompts, num_tokens]) + "\n")
            self._process.stdin.flush()
        return float(self._receive()["seconds"]) / (len(prompts) * num_tokens)

    def close(self) -> None:
        """End the process, which does so by itself when nobody asks any more."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process of OpenVINO has ended, see above")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SystemExit(f"OpenVINO: {found['error']}")
        return found


def _serve(path: str, precision: str, threads: str, clock: str) -> None:
    """Answer until nobody asks any more."""
    # Whatever the libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        _answer_all(path, precision, int(threads), CLOCKS[clock], answer)
    except Exception as error:
        # Whatever it is, whoever asked has to be told.
        answer(error=" ".join(str(error).split()) or type(error).__name__)


def _answer_all(
    path: str,
    precision: str,
    threads: int,
    clock: Callable[[], float],
    answer: Callable[..., None],
) -> None:
    numpy, openvino, genai = (__import__(name) for name in ("numpy", "openvino", "openvino_genai"))
    pipeline = genai.LLMPipeline(
        path, "CPU", INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=threads
    )
    answer(ready=True)
    for line in sys.stdin:
        prompts, num_tokens = json.loads(line)
        config = genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.min_new_tokens = config.max_new_tokens = num_tokens
        tokens = numpy.array(prompts, dtype=numpy.int64)
        inputs = genai.TokenizedInputs(
            openvino.Tensor(tokens), openvino.Tensor(numpy.ones_like(tokens))
        )
        start = clock()
        found = pipeline.generate(inputs, config).tokens
        seconds = clock() - start
        lengths = {len(one) for one in found}
        if len(found) != len(prompts) or lengths != {num_tokens}:
            raise ValueError(f"{len(found)} answers of {lengths} tokens")
        answer(seconds=seconds)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
