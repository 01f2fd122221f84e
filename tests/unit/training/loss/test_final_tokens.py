"""Tokens reach each exit in order, and are kept as long as one has yet to see them.

Layouts with gates of `tests/distributed/test_layouts.py` send them over pipeline stages."""

from types import SimpleNamespace

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.training.loss.final_tokens import FinalTokens  # noqa: E402


def test_each_exit_takes_every_microbatch_once_and_in_order():
    """On the last stage, whose other chunks have exits: two microbatches are under way."""
    final = FinalTokens((1, 3), sender=0)
    microbatches = [torch.arange(4) + 10 * number for number in range(3)]
    taken: dict[int, list[list[int]]] = {1: [], 3: []}

    def take(position: int) -> None:
        tokens = final.take(position, 4, torch.device("cpu"))
        assert tokens.dtype == torch.int64
        taken[position].append(tokens.tolist())

    final.send(microbatches[0])
    final.send(microbatches[1])
    take(3)
    take(3)
    assert len(final._tokens) == 2
    take(1)
    assert len(final._tokens) == 1
    final.send(microbatches[2])
    take(1)
    take(1)
    take(3)
    assert not final._tokens
    assert taken[1] == taken[3] == [one.tolist() for one in microbatches]
    with pytest.raises(AssertionError, match="knows its own tokens"):
        take(1)


def test_where_nobody_asks_nothing_is_kept():
    final = FinalTokens((), sender=0)
    final.send(torch.arange(4))
    assert not final._tokens


def test_only_stages_that_learn_of_a_microbatch_get_its_tokens(monkeypatch):
    sent = []

    def broadcast(message, sender, group, async_op):
        sent.append((message.tolist(), sender, group))
        return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    final = FinalTokens((), sender=3, receivers={0: "zero", 2: "two"})
    final.send(torch.arange(2))
    final.send(torch.arange(2) + 5, stages={1, 2, 3})
    final.send(torch.arange(2), stages=())
    assert sent == [([0, 1], 3, "zero"), ([0, 1], 3, "two"), ([5, 6], 3, "two")]
