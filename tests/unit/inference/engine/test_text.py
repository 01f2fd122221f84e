"""Text piece by piece is the text at once, whatever the tokenizer and the tokens."""

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.early_exit.checkpoint.utf8 import unfinished_end
from megatron.early_exit.inference.engine.text import TextStream
from tests.helpers.text_tokenizers import CORPUS, KINDS, make_tokenizer

TEXTS = [
    "    return the answer\n",
    "naïve café ☯ 😀😀 end",
    " x",
    "\n\n\t  value",
    "日本語",
    "뷁쀍",
    "👩‍👩‍👧 \ufffd �日",
    *CORPUS,
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {kind: make_tokenizer(kind, tmp_path_factory.mktemp("tokenizer")) for kind in KINDS}


def pieces_of(tokenizer, prompt, token_ids):
    stream = TextStream(tokenizer, prompt)
    last = len(token_ids) - 1
    return [stream.add(token, is_last=i == last) for i, token in enumerate(token_ids)]


def check(tokenizer, prompt, token_ids):
    """The pieces are the whole text but the prompt's, and only an unfinished character waits."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + token_ids)
    pieces = pieces_of(tokenizer, prompt, token_ids)
    unfinished = b""
    for token in prompt:
        data = tokenizer.token_bytes(token)
        unfinished = b"" if data is None else unfinished_end(unfinished + data)
    joined = "".join(pieces)
    if before + joined != whole or not whole.startswith(before):
        # The prompt begins a character, and the pieces end it.
        assert unfinished
        before = before[: len(before) - tokenizer.unfinished_length(unfinished)]
    assert before + joined == whole
    shown = before
    for place, piece in enumerate(pieces[:-1], 1):
        shown += piece
        text = tokenizer.decode(prompt + token_ids[:place])
        # What is held is no more than what `decode` gives for 3 bytes.
        assert len(text) - len(shown) <= 3
        assert set(text[len(shown) :]) <= {"\ufffd"}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(f"print {text}", add_special_tokens=False)
        for cut in range(0, len(ids), 3):
            check(tokenizer, ids[:cut], ids[cut:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_tokens_give_the_text_of_them_all(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    # Some that the tokenizer lacks: models are padded.
    known = st.integers(0, tokenizer.vocab_size + 3)
    in_bytes = [
        one for one in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(one) or b"") == 1
    ]
    some = known | st.sampled_from(in_bytes) if in_bytes else known
    prompt = data.draw(st.lists(some, max_size=12))
    token_ids = data.draw(st.lists(some, min_size=1, max_size=40))
    check(tokenizer, prompt, token_ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", "byte fallback"])
def test_an_invalid_byte_does_not_swallow_what_follows(tokenizers, kind):
    tokenizer = tokenizers[kind]
    byte = {tokenizer.token_bytes(one): one for one in range(tokenizer.vocab_size)}
    ids = [byte[bytes([one])] for one in b"x\xff" + "😀日".encode()]
    assert pieces_of(tokenizer, [], ids) == ["x", "\ufffd", "", "", "", "😀", "", "", "日"]
    assert tokenizer.decode(ids) == "x\ufffd😀日"
    halves = [byte[bytes([one])] for one in b"\xe6\x97A"]
    assert pieces_of(tokenizer, [], halves)[:2] == ["", ""]
    assert pieces_of(tokenizer, [], halves)[2].strip("\ufffd") == "A"


def test_a_byte_level_token_shows_its_whole_characters_at_once(tokenizers):
    tokenizer = tokenizers["byte level"]
    mixed = next(
        one
        for one in range(tokenizer.vocab_size)
        if unfinished_end(tokenizer.token_bytes(one)) not in (b"", tokenizer.token_bytes(one))
    )
    whole = tokenizer.token_bytes(mixed)
    tail = unfinished_end(whole)
    assert TextStream(tokenizer, []).add(mixed) == whole[: len(whole) - len(tail)].decode()


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", "byte fallback"])
def test_an_unfinished_character_at_the_end(tokenizers, kind):
    tokenizer = tokenizers[kind]
    byte = {tokenizer.token_bytes(one): one for one in range(tokenizer.vocab_size)}
    stream = TextStream(tokenizer, tokenizer.encode("x"))
    assert [stream.add(byte[bytes([one])]) for one in b"\xf0\x9f"] == ["", ""]
    assert set(stream.flush()) == {"\ufffd"}
    # One that the prompt begins and the answer ends belongs to the answer.
    first, *rest = [byte[bytes([one])] for one in "日".encode()]
    assert "".join(pieces_of(tokenizer, [first], rest)) == "日"


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizers, kind):
    tokenizer, longest = tokenizers[kind], 0

    class Counting:
        token_bytes = staticmethod(tokenizer.token_bytes)
        unfinished_length = staticmethod(tokenizer.unfinished_length)

        @staticmethod
        def decode(token_ids):
            nonlocal longest
            longest = max(longest, len(token_ids))
            return tokenizer.decode(token_ids)

    words = tokenizer.encode(" ".join(CORPUS), add_special_tokens=False)
    end = tokenizer.eod_id
    for tokens in (words * 5, [end] * 500 + words + [end] * 500, [words[0], *[end] * 500]):
        for prompt in ([], [end] * 3, words * 5):
            stream = TextStream(Counting(), prompt)
            for token in tokens:
                stream.add(token)
    assert longest <= 40


def test_sentencepiece_is_the_measure(tokenizers, tmp_path):
    """Ours decodes as the library does; a byte fallback of transformers likewise, where bytes are
    invalid."""
    tokenizer = make_tokenizer("sentencepiece", tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.decode(list(range(300))) == processor.decode(list(range(300)))
