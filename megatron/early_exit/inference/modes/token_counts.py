"""The tokens that penalties are for."""

from array import array
from collections.abc import Iterable, Sequence


class TokenCounts:
    """How often each token was generated, of those in a prompt or generated before.

    Follows a text that grows, so that a token costs the same however long the text is.

    Args:
        prompt: tokens that are seen, though not generated.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._tokens = array("q", sorted(set(prompt)))
        self._counts = array("f", [0.0] * len(self._tokens))
        self._places = {token: place for place, token in enumerate(self._tokens)}
        self._num_counted = 0

    def of(
        self, generated: Sequence[int], behind: Iterable[int] = ()
    ) -> tuple[array[int], array[float]]:
        """The tokens that were seen, each once, and how often each was generated.

        Args:
            generated: goes on from what it was at the last call.
            behind: further tokens, which may be others at the next call.
        """
        for token in generated[self._num_counted :]:
            place = self._places.setdefault(token, len(self._tokens))
            _count(self._tokens, self._counts, place, token)
        self._num_counted = len(generated)
        tokens, counts = self._tokens, self._counts
        new: dict[int, int] = {}
        for token in behind:
            if tokens is self._tokens:
                tokens, counts = tokens[:], counts[:]
            place = self._places.get(token, -1)
            _count(
                tokens, counts, place if place >= 0 else new.setdefault(token, len(tokens)), token
            )
        return tokens, counts


def _count(tokens: array[int], counts: array[float], place: int, token: int) -> None:
    if place == len(tokens):
        tokens.append(token)
        counts.append(1.0)
    else:
        counts[place] += 1.0
