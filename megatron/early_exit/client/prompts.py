"""Files of prompts."""

import json
from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: the lines of a .txt file, or JSON lines {"prompt": "..."} of others.

    Raises:
        ValueError: the file cannot be read, or a line has the wrong form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {path} cannot be read: {error}") from error
    if path.suffix == ".txt":
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = [
            _of_json(line, f"--prompts-file {path}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not prompts:
        raise ValueError(f"--prompts-file {path} has no prompts")
    return prompts


def _of_json(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'{place}: expected {{"prompt": "..."}}')
    return prompt
