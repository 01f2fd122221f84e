"""Text piece by piece is the text at once."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription, load_tokenizer
from megatron.early_exit.inference.decoding.text import TextStream

CORPUS = ["def main():", "    return the answer", "a list  of  spaces", "print(value)"] * 40


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        num_threads=1,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["exact", "dummy prefix"])
def tokenizer(request, tmp_path_factory):
    exact = request.param == "exact"
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train(add_dummy_prefix=not exact, remove_extra_whitespaces=not exact))
    return load_tokenizer(TokenizerDescription("SentencePieceTokenizer", path.name), path.parent)


def join(tokenizer, prompt, token_ids):
    stream = TextStream(tokenizer, prompt)
    last = len(token_ids) - 1
    return "".join(stream.add(token, is_last=i == last) for i, token in enumerate(token_ids))


@pytest.mark.parametrize(
    "text", ["    return the answer\n", "naïve café ☯ 😀😀 end", " x", "\n\n\t  value", "日本語"]
)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(f"print {text}")
    for cut in range(1, len(ids)):
        whole = tokenizer.decode(ids)
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            assert before + join(tokenizer, ids[:cut], ids[cut:]) == whole


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(3, 280), min_size=1, max_size=6),
    token_ids=st.lists(st.integers(3, 280), min_size=1, max_size=20),
)
def test_any_tokens_give_pieces(tokenizer, prompt, token_ids):
    pieces = join(tokenizer, prompt, token_ids)
    if "\ufffd" not in tokenizer.decode(prompt + token_ids):
        assert tokenizer.decode(prompt) + pieces == tokenizer.decode(prompt + token_ids)


def test_an_unfinished_character_waits(tokenizer):
    ids = tokenizer.encode("x😀")[-4:]
    stream = TextStream(tokenizer, tokenizer.encode("x"))
    assert [stream.add(token) for token in ids] == ["", "", "", "😀"]
    half = TextStream(tokenizer, tokenizer.encode("x"))
    assert [half.add(token) for token in ids[:2]] == ["", ""]
    assert set(half.flush()) == {"\ufffd"}


@pytest.mark.parametrize("text", ["print(value)", " x  y", "naïve 😀 日本語"])
def test_a_text_from_its_first_token_on(tokenizer, text):
    ids = tokenizer.encode(text)
    assert join(tokenizer, [], ids) == tokenizer.decode(ids)
