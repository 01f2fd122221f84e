"""Tokenizers give the ids and texts of the libraries that Megatron uses."""

import io
from argparse import ArgumentParser

import pytest
import sentencepiece
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

from megatron.early_exit.checkpoint.tokenizer import (
    TokenizerDescription,
    install_tokenizer,
    load_tokenizer,
)
from megatron.early_exit.data.tokenizer import add_tokenizer_arguments, build_text_tokenizer

TEXTS = ["def main():\n    return 1", "a  b", " lead", "trail ", "naïve 😀", ""]


def train(path, **options):
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def main(): return value", "one two three"] * 20),
        model_writer=writer,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(writer.getvalue())
    return path


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "tokenizer.model"
    return train(
        path,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )


@pytest.fixture(scope="module")
def folding(tmp_path_factory):
    return train(tmp_path_factory.mktemp("folding") / "tokenizer.model")


def load(path, **fields):
    description = TokenizerDescription("SentencePieceTokenizer", path.name, **fields)
    return load_tokenizer(description, path.parent)


def test_sentencepiece_keeps_every_space(exact):
    tokenizer = load(exact)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert tokenizer.eod_id == 2
    assert load(exact, eod_id=5).eod_id == 5


@pytest.mark.parametrize("kind", ["exact", "folding"])
def test_sentencepiece_ids_are_megatrons(kind, request):
    path = request.getfixturevalue(kind)
    ours, megatrons = load(path), SentencePieceTokenizer(str(path))
    assert ours.vocab_size == megatrons.vocab_size
    assert [ours.encode(text) for text in TEXTS] == [megatrons.text_to_ids(t) for t in TEXTS]


def test_settings_that_are_not_supported(exact, folding):
    with pytest.raises(ValueError, match="ignore-extra-whitespaces is not supported"):
        load(folding, keeps_extra_spaces=True)
    assert load(exact, keeps_extra_spaces=True).encode("a  b") == load(exact).encode("a  b")


@pytest.mark.parametrize("kind", ["exact", "folding"])
def test_the_special_tokens_of_ee_llm(kind, request):
    path = request.getfixturevalue(kind)
    tokenizer = load(path, legacy=True, num_extra_ids=2)
    size = load(path).vocab_size
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>"]
    assert [tokenizer.token_name(size + i) for i in range(len(added))] == added
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (size + len(added), size + 2)
    assert tokenizer.bos_id == 1
    parser = ArgumentParser()
    add_tokenizer_arguments(parser)
    flags = ["--tokenizer-type=SentencePieceTokenizer", f"--tokenizer-model={path}"]
    flags += ["--tokenizer-sentencepiece-legacy", "--vocab-extra-ids=2"]
    megatrons = build_text_tokenizer(parser.parse_args(flags))
    assert (megatrons.vocab_size, megatrons.eod) == (tokenizer.vocab_size, tokenizer.eod_id)
    for text in (*TEXTS, "one<EOD>two <MASK> three<CLS>", "<SEP> x</s>y<s>", "a<extra_id_1> <PAD>"):
        assert tokenizer.encode(text) == list(megatrons.tokenize(text))
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([*ids, size + 2]) == "one two"
    assert tokenizer.token_bytes(size + 2) == b""
    for more, match in (
        (["--tokenizer-special-tokens", "<x>"], "--tokenizer-special-tokens cannot be combined"),
        (["--tokenizer-type=NullTokenizer", "--vocab-size=9"], "has no effect with"),
    ):
        with pytest.raises(ValueError, match=match):
            build_text_tokenizer(parser.parse_args([*flags, *more]))
    with pytest.raises(ValueError, match="--vocab-extra-ids 2: has no effect without"):
        build_text_tokenizer(parser.parse_args([*flags[:2], flags[3]]))


def test_kinds_without_text():
    for kind in ("NullTokenizer", "TikTokenizer"):
        assert load_tokenizer(TokenizerDescription(kind, None), None) is None


def test_files_must_be_there_and_sound(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load(tmp_path / "absent.model")
    with pytest.raises(ValueError, match="names no --tokenizer-model"):
        load_tokenizer(TokenizerDescription("SentencePieceTokenizer", None), tmp_path)
    (tmp_path / "bad.model").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load(tmp_path / "bad.model")


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("huggingface")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["def main(): return value", "one two three"] * 20, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights that must not travel")
    return folder


@pytest.mark.parametrize("adds_special_tokens", [True, False])
def test_huggingface_ids_are_megatrons(huggingface, adds_special_tokens):
    description = TokenizerDescription(
        "HuggingFaceTokenizer", ".", adds_special_tokens=adds_special_tokens
    )
    ours = load_tokenizer(description, huggingface)
    megatrons = HuggingFaceTokenizer(str(huggingface), include_special_tokens=adds_special_tokens)
    assert (ours.vocab_size, ours.eod_id) == (megatrons.vocab_size, megatrons.eod)
    assert [ours.encode(text) for text in TEXTS] == [megatrons.text_to_ids(t) for t in TEXTS]
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS


def test_huggingface_files_travel_without_the_model(huggingface, tmp_path):
    description = TokenizerDescription("HuggingFaceTokenizer", str(huggingface), eod_id=1)
    installed = install_tokenizer(description, tmp_path / "tokenizer")
    assert installed.model == "."
    names = {file.name for file in (tmp_path / "tokenizer").iterdir()}
    assert "tokenizer.json" in names
    assert "model.safetensors" not in names
    there = load_tokenizer(installed, tmp_path / "tokenizer")
    assert there.encode("one two") == load_tokenizer(description, huggingface).encode("one two")
