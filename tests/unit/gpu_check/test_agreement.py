"""Texts of two ways to compute them agree, but for rounding."""

from __future__ import annotations

import pytest

from tests.helpers.small_gpu_check import result

# The tool has put the folder of these on the path.
from gpu_sections.agreement import agreement_of  # isort: skip


def test_different_tokens_agree_only_if_they_were_as_probable():
    same = agreement_of([result("abc")], [result("abc", shift=0.01)])
    assert (same.num_equal, same.is_exact) == (3, True)
    assert same.largest_difference == pytest.approx(0.01)
    assert same.within(0.02)
    assert not same.within(0.005)
    near = agreement_of([result("abc", "xyz", gap=0.01)], [result("ayc")])
    assert (near.num_equal, near.is_exact, near.within(0.02)) == (1, False, True)
    far = agreement_of([result("abc", "xyz", gap=0.5)], [result("ayc")])
    assert not far.within(0.02)
    assert not agreement_of([result("abc", "xyz", gap=0.0)], [result("aqc")]).within(0.02)
    assert not agreement_of([result("abc")], [result("ab")]).within(0.02)
