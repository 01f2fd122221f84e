"""Tokens by themselves, as answers name them."""

import pytest

from megatron.early_exit.server.bodies.token_texts import TokenTexts, as_token_id
from tests.helpers.text_tokenizers import make_tokenizer


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    return make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def test_names_are_distinct_and_bytes_are_given(tokenizer):
    texts = TokenTexts(tokenizer)
    size = tokenizer.vocab_size
    names = [texts.of(token) for token in range(size)]
    parts = [token for token in range(size) if names[token].startswith("bytes:")]
    assert len({names[token] for token in parts}) == len(parts) >= 128
    byte = {texts.bytes_of(token): names[token] for token in parts}
    assert byte[b"\xe6"] == "bytes:\\xe6"
    assert "\ufffd" not in "".join(names)
    for token, name in enumerate(names):
        data = texts.bytes_of(token)
        if data is not None and token not in parts:
            assert data.decode() == name
    # What a text lacks has the vocabulary's name.
    end = tokenizer.eod_id
    assert (names[end], texts.bytes_of(end)) == ("</s>", None)
    assert texts.of(size + 5) == as_token_id(size + 5) == f"token_id:{size + 5}"


def test_spaces_and_letters_of_tokens(tokenizer):
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("print(value) 日本", add_special_tokens=False)
    joined = b"".join(texts.bytes_of(token) for token in ids).decode()
    assert joined.strip() == "print(value) 日本"


def test_offsets_are_places_in_the_text(tokenizer):
    texts = TokenTexts(tokenizer)
    byte = {tokenizer.token_bytes(one): one for one in range(tokenizer.vocab_size)}
    x, *parts = [byte[bytes([one])] for one in b"x" + "日".encode()]
    # A whole character, one that is left unfinished, and what stands behind it.
    ids = [x, *parts, x, parts[0], x, x]
    assert tokenizer.decode(ids) == "x日x\ufffdxx"
    assert texts.offsets(ids) == [0, 1, 1, 1, 2, 3, 4, 5]


def test_without_a_tokenizer():
    texts = TokenTexts(None)
    assert (texts.of(7), texts.bytes_of(7)) == ("7", None)
    assert texts.offsets([7, 8]) == [0, 0]
