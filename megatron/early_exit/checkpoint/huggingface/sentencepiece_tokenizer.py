"""SentencePiece models as tokenizers of Hugging Face's.

transformers takes any SentencePiece model for Llama's: it puts a space in front of texts that
were never trained with one. Here the model's own settings decide, and what cannot be said exactly,
or turns out to differ, is no tokenizer.
"""

from pathlib import Path
from typing import Any

_SPACE = "▁"
_PROBES = (
    "Hello  world, 123!",
    " two  spaces   and\ttabs\r\n",
    "def f(x):\n    return x\n\n\nclass A:\n\tpass",
    "Liberté ÉGALITÉ straße 日本語 🥐 \u200b e\u0301",
    "",
)
_PIECES_TOGETHER = 50


def convert_sentencepiece(path: Path) -> Any | None:
    """A tokenizer of transformers' that gives the ids that a SentencePiece model gives.

    Args:
        path: of the model.

    Returns:
        None where there is none: it is not a BPE model, it changes characters or drops spaces, or
        ids differ.

    Raises:
        ValueError: it is not a SentencePiece model.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"tokenizer {path}: is not a SentencePiece model") from error
    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    if trained.model_type != trained.BPE or trained.treat_whitespace_as_suffix:
        return None
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces:
        return None
    names = {
        f"{kind}_token": processor.id_to_piece(number)
        for kind in ("bos", "eos", "pad", "unk")
        if (number := getattr(processor, f"{kind}_id")()) >= 0
    }
    fast: Any = PreTrainedTokenizerFast
    converted = fast(tokenizer_object=_backend(proto), clean_up_tokenization_spaces=False, **names)
    texts = [*_PROBES, *_samples(proto)]
    same = all(
        converted(text, add_special_tokens=False).input_ids == processor.encode(text)
        for text in texts
    )
    return converted if same else None


def _backend(proto: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    normal, user_defined = proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    # SentencePiece joins the pair whose result has the best score; the format here wants the pairs.
    merges: list[tuple[float, str, str]] = []
    for piece in proto.pieces:
        if piece.type == normal:
            halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
            merges += [
                (-piece.score, left, right)
                for left, right in halves
                if left in vocabulary and right in vocabulary
            ]
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])],
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    backend.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend(_SPACE)] if has_prefix else []),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if has_prefix else []),
        ]
    )
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=True, special=False)
            for piece in proto.pieces
            if piece.type == user_defined
        ]
    )
    return backend


def _samples(proto: Any) -> list[str]:
    """Texts that every piece is in, with spaces and without."""
    pieces = [piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL]
    return [
        between.join(pieces[start : start + _PIECES_TOGETHER]).replace(_SPACE, " ")
        for start in range(0, len(pieces), _PIECES_TOGETHER)
        for between in ("", " ")
    ]
