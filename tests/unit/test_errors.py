"""A refused value carries its field, so that no edge has to read a sentence."""

import pytest

from megatron.early_exit.errors import FieldError


@pytest.mark.parametrize(
    ("error", "text", "flag"),
    [
        (
            FieldError("top_k", "is out of range", "0 or more", value=-2),
            "top_k -2 is out of range, allowed: 0 or more",
            "--top-k -2 is out of range, allowed: 0 or more",
        ),
        (
            FieldError("prompts", "a prompt is empty", "1 token or more"),
            "prompts: a prompt is empty, allowed: 1 token or more",
            "--top-k: a prompt is empty, allowed: 1 token or more",
        ),
        (FieldError("stop", "is odd"), "stop: is odd", "--top-k: is odd"),
        (FieldError("seed", "is odd", value=None), "seed None is odd", "--top-k None is odd"),
    ],
)
def test_the_sentence_is_made_for_whom_it_is_told(error, text, flag):
    assert isinstance(error, ValueError)
    assert str(error) == text
    assert error.named("--top-k") == flag
