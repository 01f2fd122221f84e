"""UTF-8 characters that arrive byte by byte."""

import codecs

REPLACEMENT = "\ufffd"
"""The character that decoders return for bytes that are not a character."""


def unfinished_end(data: bytes) -> bytes:
    """The bytes at the end that may become a character with further ones: 3 at most."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data[-4:])
    return decoder.getstate()[0]


def is_beginning(data: bytes) -> bool:
    """Whether bytes are characters, of which the last one may be unfinished."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.end == len(data) and bool(unfinished_end(data))
    return True


def without_invalid(tokens: list[str]) -> list[str]:
    """Tokens of byte fallback with those that are no part of a character replaced by U+FFFD.

    The decoder of the tokenizers library gives up all bytes in a row for one that is invalid;
    SentencePiece, whose tokens these are, gives up that one.
    """
    found: list[str] = []
    row = bytearray()
    for token in [*tokens, ""]:
        value = fallback_byte(token)
        if value is not None:
            row.append(value)
            continue
        for character in row.decode(errors="surrogateescape"):
            is_invalid = "\udc80" <= character <= "\udcff"
            found += (
                [REPLACEMENT] if is_invalid else [f"<0x{byte:02X}>" for byte in character.encode()]
            )
        row.clear()
        found.append(token)
    return found[:-1]


def fallback_byte(token: str) -> int | None:
    """The byte that a token of byte fallback stands for, as 10 is `<0x0A>`; None for others."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def byte_level_alphabet() -> dict[str, int]:
    """The characters that GPT-2 and its successors write bytes as."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + place): byte for place, byte in enumerate(others)}
