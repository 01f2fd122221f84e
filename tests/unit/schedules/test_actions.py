"""An action that is written as text is the same when it is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.schedules.actions import Action, Microbatch

actions = st.builds(
    Action,
    st.integers(0, 99),
    st.sampled_from(["F", "B", "I", "W", "L", "SF", "RF", "SB", "RB"]),
    st.builds(Microbatch, st.integers(0, 999), st.sampled_from(["", "w", "c"])),
)


@given(actions)
def test_action_reads_what_it_writes(action):
    assert Action.parse(str(action)) == action


def test_action_as_text():
    assert str(Action(2, "F", Microbatch(0))) == "2F0"
    assert str(Action(0, "SB", Microbatch(1, "w"))) == "0SBw1"


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2F", "2F-1", "2Fz1", "2F0 "])
def test_other_texts_are_no_actions(text):
    with pytest.raises(ValueError, match="is not an action, allowed: stage, then one of F B I W L"):
        Action.parse(text)
