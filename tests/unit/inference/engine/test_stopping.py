"""The end of a sequence, and text cut at stop strings whatever the pieces."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.engine.stopping import Stopping, StopStrings, stop_token_ids
from megatron.early_exit.inference.engine.text import TextStream

EOD = 0


class Letters:
    """Token 1 is `a`, token 2 is `b` and so on; from 200 on, a byte of UTF-8 each."""

    vocab_size = 512
    eod_id = EOD
    other_end_ids = ()

    def encode(self, text):
        return [ord(letter) - ord("a") + 1 for letter in text]

    def decode(self, token_ids):
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id):
        if token_id == EOD:
            return b""
        return bytes([token_id - 200 if token_id >= 200 else token_id + 96])

    def unfinished_length(self, data):
        return 1


def cut(text, stops, num_free=0):
    """The text cut at the first stop string, letter by letter, and that string.

    Stop strings within the first `num_free` letters do not count.
    """
    for end in range(num_free + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


texts = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(st.lists(texts, max_size=12), stop_lists)
@example(["ab", "cd"], ["abcd", "bc"])
@example(["aab"], ["ab"])
def test_text_is_cut_at_the_first_stop_whatever_the_pieces(pieces, stops):
    strings, given_out, seen = StopStrings(stops), "", ""
    for piece in pieces:
        given_out += strings.add(piece)
        seen += piece
        if strings.matched is not None:
            break
        assert seen.startswith(given_out)
    assert (given_out + strings.flush(), strings.matched) == cut("".join(pieces), stops)


@given(texts, stop_lists)
def test_only_what_may_become_a_stop_is_held_back(text, stops):
    strings = StopStrings(stops)
    certain = strings.add(text, may_stop=False)
    held = strings.flush()
    assert certain + held == text
    beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
    assert len(held) == max((len(b) for b in beginnings if text.endswith(b)), default=0)


def run(token_ids, room=100, **fields):
    """Feed tokens until the end; gives the stopping, the text and the number of tokens."""
    params = SamplingParams(max_tokens=max(room, 1), **fields)
    stopping = Stopping(params, stop_token_ids(params, EOD), room, TextStream(Letters(), [1]))
    pieces = []
    for token in token_ids:
        if stopping.finish_reason is not None:
            break
        pieces.append(stopping.add(token))
    return stopping, "".join(pieces)


LETTERS = Letters().encode("abcabf")


@pytest.mark.parametrize(
    ("tokens", "fields", "reason", "stop_reason", "text", "num_tokens"),
    [
        (LETTERS, {"room": 4}, "length", None, "abca", 4),
        (LETTERS, {}, None, None, "abcabf", 6),
        ([1, EOD, 2], {}, "stop", None, "a", 2),
        ([1, EOD, 2], {"ignore_eos": True, "room": 3}, "length", None, "ab", 3),
        (LETTERS, {"stop_token_ids": (3,)}, "stop", 3, "ab", 3),
        ([1, EOD, 2], {"stop_token_ids": (EOD,), "ignore_eos": True}, "stop", EOD, "a", 2),
        ([1, 2, EOD], {"min_tokens": 2}, "stop", None, "ab", 3),
        (LETTERS, {"stop": "cab"}, "stop", "cab", "ab", 5),
        (LETTERS, {"stop": ("x", "bf", "abf")}, "stop", "abf", "abc", 6),
        (LETTERS, {"stop": "ab", "min_tokens": 1}, "stop", "ab", "", 2),
        (LETTERS, {"stop": "ab", "min_tokens": 2}, "stop", "ab", "abc", 5),
        (LETTERS, {"stop": "ca", "room": 4}, "stop", "ca", "ab", 4),
        # What was held back comes out when the end is another.
        (LETTERS, {"stop": "bcax", "room": 4}, "length", None, "abca", 4),
        (LETTERS, {"stop": "abx", "stop_token_ids": (3,)}, "stop", 3, "ab", 3),
        # Half a character at the end.
        ([1, 200 + 0xF0, 200 + 0x9F], {"room": 3}, "length", None, "a\ufffd", 3),
        ([1, 200 + 0xF0, EOD], {}, "stop", None, "a\ufffd", 3),
        # A stop string behind an invalid byte, and one of a character in parts.
        ([1, 455, 440, 359, 352, 328, 2], {"stop": "b"}, "stop", "b", "a\ufffd😀", 7),
        ([1, 455, 440, 359, 352, 328, 2], {"stop": "😀"}, "stop", "😀", "a\ufffd", 6),
    ],
)
def test_end(tokens, fields, reason, stop_reason, text, num_tokens):
    stopping, given_out = run(tokens, **fields)
    assert (stopping.finish_reason, stopping.stop_reason) == (reason, stop_reason)
    assert (given_out, stopping.num_tokens) == (text, num_tokens)


@given(st.text("abc", min_size=1, max_size=30), stop_lists, st.integers(0, 30))
def test_end_is_that_of_the_text_letter_by_letter(text, stops, min_tokens):
    room = len(text)
    min_tokens = min(min_tokens, room)
    stopping, given_out = run(Letters().encode(text), room, stop=stops, min_tokens=min_tokens)
    assert (given_out, stopping.stop_reason) == cut(text, stops, num_free=min_tokens)
    assert stopping.finish_reason == ("length" if stopping.stop_reason is None else "stop")


def test_offsets_are_places_in_the_text():
    params = SamplingParams(stop="bcdx")
    stopping = Stopping(params, {}, 100, TextStream(Letters(), [1]))
    offsets = []
    # Parts of a character, one that is left unfinished, and letters that a stop string holds back.
    for token in [1, 440, 359, 352, 328, 1, 440, 359, 2, 3, 4, 5]:
        stopping.add(token)
        offsets.append(stopping.offset)
    assert offsets == [0, 1, 1, 1, 1, 2, 3, 3, 4, 5, 6, 7]


def test_nothing_to_generate():
    params = SamplingParams(max_tokens=0, echo=True)
    assert Stopping(params, {}, 0, None).finish_reason == "length"


def test_tokens_without_text():
    params = SamplingParams(stop_token_ids=(3,))
    stopping = Stopping(params, stop_token_ids(params, None), 16, None)
    assert [stopping.add(1), stopping.add(3)] == [None, None]
    assert (stopping.finish_reason, stopping.stop_reason) == ("stop", 3)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"stop \('x',\) needs a tokenizer .*, allowed: \(\)"):
        Stopping(SamplingParams(stop="x"), {}, 16, None)


def test_which_tokens_end_a_sequence():
    asked = SamplingParams(stop_token_ids=(3, 4))
    assert stop_token_ids(asked, 5) == {3: 3, 4: 4, 5: None}
    assert stop_token_ids(asked, 5, (6, 5)) == {3: 3, 4: 4, 5: None, 6: 6}
    assert stop_token_ids(SamplingParams(ignore_eos=True, stop_token_ids=(5,)), 5, (6,)) == {5: 5}
    assert stop_token_ids(SamplingParams(), None) == {}
