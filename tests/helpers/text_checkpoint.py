"""A tiny model for text: random weights, exits, and a tokenizer with a chat template."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription
from tests.helpers.mtp_models import mtp_model
from tests.helpers.tiny_models import LLAMA, make_model, save_checkpoint

VOCAB_SIZE = 320
CONTEXT = 256
EXITS = (1, 3)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('there are no tools') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}assistant:"
)
_TEXT = "the {} quick brown foxes jump over lazy dogs, pack my box with five dozen liquor jugs"


def save_text_checkpoint(
    folder: Path,
    exits: tuple[int, ...] = EXITS,
    chat: bool = True,
    seed: int = 0,
    exit_vocab_size: int | None = None,
    depths: int = 0,
) -> Path:
    """Write a checkpoint whose tokenizer has every byte, `<s>` (1) and `</s>` (2), and which may
    have a multi-token-prediction module."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT.format(n) for n in range(50)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    target = folder / "model"
    tokenizer.save_pretrained(folder / "tokenizer")
    architecture = replace(LLAMA, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    heads = {"use_exit_norm": bool(exits), "exit_vocab_size": exit_vocab_size}
    if depths:
        model = mtp_model(depths, False, architecture, exits=exits, seed=seed, **heads)
    else:
        model = make_model(architecture, exits=exits, seed=seed, **heads)
    save_checkpoint(model, target)
    args = SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer")
    )
    tokenizer_description = TokenizerDescription.from_args(args, 2)
    description = ModelDescription(model.architecture, model.early_exit, tokenizer_description)
    write_description(target, description)
    return target
