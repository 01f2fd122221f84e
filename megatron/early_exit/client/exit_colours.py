"""Text on a terminal, coloured by the exits that its tokens come from."""

import os
from collections.abc import Sequence
from typing import TextIO

_COLOURS = ("\x1b[42m\x1b[30m", "\x1b[46m\x1b[30m", "\x1b[43m\x1b[30m", "\x1b[45m\x1b[37m")
_RESET = "\x1b[0m"


class ExitColours:
    """Writes a text as it is generated, and counts its tokens.

    Args:
        layers: numbers of layers of the exits and of the whole model.
        out: the output, which is coloured if it is a terminal and `NO_COLOR` is not set.
    """

    def __init__(self, layers: Sequence[int], out: TextIO) -> None:
        colour = out.isatty() and "NO_COLOR" not in os.environ
        self._out = out
        self._marks = {
            layer: _COLOURS[i % len(_COLOURS)] if colour else "" for i, layer in enumerate(layers)
        }
        self._reset = _RESET if colour else ""
        self._counts = dict.fromkeys(layers, 0)

    def write(self, text: str, layer: int) -> None:
        """Write what a token adds to the text, if anything; `layer` is that which gave it."""
        self._counts[layer] += 1
        # A background must not run over the end of a line.
        pieces = text.split("\n")
        mark, reset = self._marks[layer], self._reset
        self._out.write("\n".join(f"{mark}{piece}{reset}" if piece else "" for piece in pieces))
        self._out.flush()

    def legend(self) -> str:
        """A legend of the colours, with the number of tokens of each."""
        return ", ".join(
            f"{self._marks[layer]}layer {layer}{self._reset}: {count} tokens"
            for layer, count in self._counts.items()
        )
