"""llama.cpp in a process of its own, as others use it.

Beside PyTorch in one process its threads count as if they worked all the time. The threads of the
OpenMP that PyTorch uses then sleep where they would wait for each other awake, and a step of this
project takes up to half as long again.
"""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peer_openvino import CLOCKS

_CONTEXT = 512
_STARTS_WITHIN = 120.0
"""Seconds that it may take to load a model."""
_ENDS_WITHIN = 10.0
"""Seconds that it may take to end before it is killed."""


class LlamaCpp:
    """llama.cpp with a file, and room for a number of sequences at a time.

    Args:
        path: the model, a GGUF file.
        batch: number of sequences.
        threads: that it computes with.
        clock: by which it is timed, one of `CLOCKS`.
    """

    def __init__(self, path: Path, batch: int, threads: int, clock: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        args = (other, str(path), batch, threads, clock)
        self._process = context.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        other.close()
        if not self._connection.poll(_STARTS_WITHIN):
            raise SystemExit(f"llama.cpp has not started within {_STARTS_WITHIN:.0f} s")
        self._receive()

    def seconds_per_token(self, prompts: list[list[int]], num_tokens: int) -> float:
        """How long it takes to answer prompts with some tokens each, greedily."""
        self._connection.send((prompts, num_tokens))
        return float(self._receive()) / (len(prompts) * num_tokens)

    def close(self) -> None:
        """End the process, which does so by itself when nobody asks any more."""
        self._connection.close()
        self._process.join(_ENDS_WITHIN)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            found = self._connection.recv()
        except EOFError:
            raise SystemExit("the process of llama.cpp has ended, see above") from None
        if isinstance(found, str):
            raise SystemExit(found)
        return found


def _serve(connection: Connection, path: str, batch: int, threads: int, clock: str) -> None:
    """Answer until nobody asks any more."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx = batch, batch * _CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    connection.send(None)
    with ThreadPoolExecutor(batch) as senders:
        while True:
            try:
                prompts, num_tokens = connection.recv()
            except EOFError:
                return
            bodies = [
                {
                    "prompt": prompt,
                    "max_tokens": num_tokens,
                    "temperature": 0.0,
                    "ignore_eos": True,
                    "cache_prompt": False,
                }
                for prompt in prompts
            ]
            start = CLOCKS[clock]()
            answers = list(senders.map(server.handle_completions, bodies))
            seconds = CLOCKS[clock]() - start
            short = [a for a in answers if a["usage"]["completion_tokens"] != num_tokens]
            connection.send(f"llama.cpp has ended early: {short[0]}" if short else seconds)
