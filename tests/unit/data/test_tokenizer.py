"""Megatron's tokenizers from its flags: the ids of the library behind them, and clear refusals."""

from argparse import ArgumentParser
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece

from examples.quickstart.corpus import EOS, train_tokenizer
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription, load_tokenizer
from megatron.early_exit.data.tokenizer import (
    TextTokenizer,
    add_tokenizer_arguments,
    build_text_tokenizer,
)

TEXTS = [text for _, text in sorted(topics.items())][:100]


def build(*flags: str) -> TextTokenizer:
    parser = ArgumentParser()
    add_tokenizer_arguments(parser)
    return build_text_tokenizer(parser.parse_args(flags))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS, 600))
    return str(path)


def test_sentencepiece_gives_the_ids_of_the_library_and_of_generation(model_file: str) -> None:
    tokenizer = build("--tokenizer-type=SentencePieceTokenizer", "--tokenizer-model", model_file)
    library = sentencepiece.SentencePieceProcessor(model_file=model_file)
    assert tokenizer.vocab_size == 600
    assert tokenizer.eod == EOS
    description = TokenizerDescription("SentencePieceTokenizer", Path(model_file).name)
    generation = load_tokenizer(description, Path(model_file).parent)
    assert generation is not None
    assert generation.eod_id == EOS
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert ids == library.encode(text) == generation.encode(text)
        assert generation.decode(ids) == text


def test_hugging_face_gives_the_ids_of_the_library_and_of_generation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "<s>": 1, "<eod>": 2, "hello": 3, "world": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<eod>"
    ).save_pretrained(tmp_path)
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path))
    tokenizer = build(*flags)
    assert (tokenizer.vocab_size, tokenizer.eod) == (5, 2)
    assert tokenizer.tokenize("hello new world") == [1, 3, 0, 4]
    plain = build(*flags, "--tokenizer-hf-no-include-special-tokens")
    assert plain.tokenize("hello new world") == [3, 0, 4]
    for adds_special_tokens, same in ((True, tokenizer), (False, plain)):
        description = TokenizerDescription(
            "HuggingFaceTokenizer", ".", adds_special_tokens=adds_special_tokens
        )
        generation = load_tokenizer(description, tmp_path)
        assert generation is not None
        assert generation.eod_id == same.eod
        assert generation.encode("hello new world") == same.tokenize("hello new world")


def test_null_tokenizer() -> None:
    tokenizer = build("--tokenizer-type", "NullTokenizer", "--vocab-size", "100")
    assert tokenizer.tokenize("3 14 15") == [3, 14, 15]
    assert (tokenizer.vocab_size, tokenizer.eod) == (100, 99)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--tokenizer-type None: must be one of the text tokenizers"),
        (("--tokenizer-type=SFTTokenizer",), "--tokenizer-type SFTTokenizer: must be one of"),
        (("--tokenizer-type=HuggingFaceTokenizer",), "--tokenizer-model is required with"),
        (("--tokenizer-type=NullTokenizer",), "--vocab-size is required with"),
        (
            ("--tokenizer-type=SentencePieceTokenizer", "--tokenizer-model=missing.model"),
            r"--tokenizer-model missing\.model: cannot be used as SentencePieceTokenizer \(",
        ),
        (
            ("--tokenizer-type=SentencePieceTokenizer", f"--tokenizer-model={__file__}"),
            "cannot be used as SentencePieceTokenizer",
        ),
    ],
)
def test_wrong_flags_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(*flags)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_size_that_contradicts_the_model_is_refused(model_file: str) -> None:
    flags = ("--tokenizer-type=SentencePieceTokenizer", "--tokenizer-model", model_file)
    assert build(*flags, "--vocab-size=600").vocab_size == 600
    with pytest.raises(ValueError, match="--vocab-size 601: the tokenizer has 600 tokens"):
        build(*flags, "--vocab-size=601")
