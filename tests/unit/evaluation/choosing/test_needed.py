"""How many texts are said to be needed, against trying all numbers."""

from __future__ import annotations

from itertools import count

import pytest

from megatron.early_exit.evaluation.choosing.needed import table, texts_needed
from megatron.early_exit.evaluation.choosing.p_values import Losses, p_value


@pytest.mark.parametrize("is_binary", [False, True])
def test_the_least_number_without_any_loss_is_found(is_binary):
    for limit, level in ((0.1, 0.05), (0.01, 0.05), (0.02, 0.01)):
        found = texts_needed(limit, level, is_binary=is_binary)
        proven = (n for n in count(1) if p_value(Losses(0.0, n, is_binary), limit) <= level)
        assert found == next(proven)
    # Of 299 texts none may be lost, for 99 % with a confidence of 95 %: 0.99^299 = 0.0495.
    assert texts_needed(0.01, 0.05) == 299


def test_a_number_is_enough_for_the_loss_that_is_observed_and_one_less_is_not():
    for loss in (0.002, 0.005, 0.008):
        found = texts_needed(0.01, 0.05, loss)
        assert p_value(Losses(loss * found, found), 0.01) <= 0.05
        assert p_value(Losses(loss * (found - 1), found - 1), 0.01) > 0.05


def test_no_number_is_enough_where_too_much_is_lost():
    assert texts_needed(0.01, 0.05, 0.01) is None
    assert texts_needed(0.01, 0.05, 0.0099999) is None


def test_the_table_has_the_numbers():
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table().splitlines()]
    assert rows[0][:3] == ["may be lost", "paths", "0% of that is lost"]
    (row,) = [one for one in rows if one[:2] == ["1.0%", "1"]]
    assert row[2] == "299"
    assert row[4] == f"{texts_needed(0.01, 0.05, 0.005):,}"
