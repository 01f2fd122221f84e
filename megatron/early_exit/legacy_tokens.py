"""The tokens that EE-LLM (arXiv 2312.04916), and Megatron before 2025, put behind a SentencePiece
model's own."""

from typing import Any


def legacy_special_tokens(model: Any, num_extra: int) -> dict[str, str]:
    """Special tokens by the names that megatron-core's legacy mode has for them, in the order in
    which those that the model lacks are numbered.

    Args:
        model: a `SentencePieceProcessor`.
        num_extra: `--vocab-extra-ids`.
    """

    def own(token_id: int, otherwise: str) -> str:
        return otherwise if token_id < 0 else str(model.id_to_piece(token_id))

    return {
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        # megatron-core ends documents with what it calls by this name.
        "eos_token": "<EOD>",
        "mask_token": "<MASK>",
        "pad_token": own(model.pad_id(), "<PAD>"),
        "bos_token": own(model.bos_id(), "<BOS>"),
        "end_of_sentence_token": own(model.eos_id(), "<EOS>"),
        **{f"extra_token_{i}": f"<extra_id_{i}>" for i in range(num_extra)},
    }


def number_legacy_tokens(model: Any, num_extra: int) -> dict[str, int]:
    """The same by their texts, with their numbers; see `legacy_special_tokens`."""
    size = model.get_piece_size()
    own = {model.id_to_piece(token_id): token_id for token_id in range(size)}
    found: dict[str, int] = {}
    num_added = 0
    for text in legacy_special_tokens(model, num_extra).values():
        if text in found:
            continue
        found[text] = own.get(text, size + num_added)
        num_added += text not in own
    return found
