"""The messages that docs/troubleshooting.md quotes are those that the code gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.compile(r"^### `(.+)`$", re.MULTILINE)
HEADING = re.compile(r"^### ", re.MULTILINE)
VALUE = "\0"


def texts() -> str:
    """All strings of the code, with a mark in the place of each value, and the scripts of make."""
    found = [path.read_text() for path in (ROOT / "tools" / "setup").glob("*.sh")]
    for folder in ("megatron", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (
                        one.value if isinstance(one, ast.Constant) else VALUE for one in node.values
                    )
                    found.append("".join(map(str, parts)))
    return "\n".join(found)


def missing(quoted: list[str], code: str) -> list[str]:
    """Parts of quoted messages, between the dots, that no string of the code has."""
    parts = [part.strip() for message in quoted for part in message.split("...")]
    return [part for part in parts if part.strip(" ,:;()-") and part not in code]


def test_quoted_messages_are_in_the_code():
    quoted = QUOTED.findall(PAGE)
    assert len(quoted) == len(HEADING.findall(PAGE)) >= 30
    code = texts()
    assert missing(quoted, code) == []
    assert missing(["--save ... holds doughnuts, allowed: ..."], code) == [
        "holds doughnuts, allowed:"
    ]
