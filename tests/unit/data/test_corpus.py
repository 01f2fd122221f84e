"""The demo's data: the same on every run, and a tokenizer that gives every text back."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from examples.quickstart.corpus import (
    BOS,
    EOS,
    PAD,
    UNK,
    build_corpus,
    main,
    split,
    train_tokenizer,
)
from megatron.early_exit.data.standard_library import SPACE_MARK, is_prose_or_code


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(list(topics.values())[:100], 600)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_the_corpus_is_large_and_the_same_on_every_run(tmp_path: Path) -> None:
    corpora = [build_corpus(tmp_path / name, vocab_size=1024) for name in ("first", "second")]
    for name in ("train", "validation", "tokenizer_model"):
        first, second = (getattr(corpus, name).read_bytes() for corpus in corpora)
        assert first == second
    train, validation = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (corpora[0].train, corpora[0].validation)
    )
    assert sum(map(len, train)) > 5_000_000
    share = sum(map(len, validation)) / sum(map(len, train + validation))
    assert 0.04 < share < 0.1
    assert set(train).isdisjoint(validation)
    assert any("class JSONDecoder" in text for text in train + validation)

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(corpora[0].tokenizer_model))
    assert tokenizer.vocab_size() == 1024
    for text in validation:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert {UNK, BOS, EOS, PAD}.isdisjoint(ids)


@given(
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\tax")))
)
def test_every_text_comes_back(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    text = text.replace(SPACE_MARK, "")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert {UNK, BOS, EOS, PAD}.isdisjoint(ids)


def test_indentation_is_one_token(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    pieces = tokenizer.encode("if x:\n        y\n\n", out_type=str)
    assert SPACE_MARK * 8 in pieces
    assert pieces[-1] == "\n\n"
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (
        UNK,
        BOS,
        EOS,
        PAD,
    )


def test_splitting_depends_on_the_seed_alone() -> None:
    texts = [str(number) * 10 for number in range(100)]
    train, validation = split(texts, 0.1, seed=1)
    assert sorted(train + validation) == sorted(texts)
    assert split(texts, 0.1, seed=1) == (train, validation)
    assert split(texts, 0.1, seed=2) != (train, validation)


def test_tables_and_unfaithful_texts_are_left_out() -> None:
    assert is_prose_or_code("def f(x):\n    return x + 1\n")
    assert not is_prose_or_code("0x00: 0x0000, 0x01: 0x0001")
    assert not is_prose_or_code(f"a space is {SPACE_MARK}")
    assert not is_prose_or_code(" \n")


@pytest.mark.parametrize("size", [511, 32769, -1])
def test_a_vocabulary_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"--vocab-size {size}: must be from 512 to 32768"):
        train_tokenizer(["text"], size)


def test_a_vocabulary_too_large_for_the_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="--vocab-size 5000: does not suit the texts"):
        train_tokenizer(["a short text"], 5000)


def test_mistakes_end_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output-dir", str(tmp_path / "data"), "--vocab-size", "1"]) == 2
    assert capsys.readouterr().err == "error: --vocab-size 1: must be from 512 to 32768\n"
    assert not (tmp_path / "data").exists()
