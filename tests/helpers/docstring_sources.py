"""Where docstrings name a published work without its source; see `tests/unit/test_docstrings.py`.

Works whose names are words that everyone uses without thinking of a paper (1F1B, LayerNorm,
softmax) are left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

SOURCES = {
    "Adam": "arXiv 1412.6980",
    "CALM": "arXiv 2207.07061",
    "Daly": "2006",
    "DeepSeek-V3": "arXiv 2412.19437",
    "DEL": "arXiv 2504.05598",
    "DEX": "arXiv 2606.29223",
    "DREX": "arXiv 2512.15705",
    "DSSD": "Valade, 2026",
    "EAGLE": "arXiv",
    "EE-LLM": "arXiv 2312.04916",
    "EE-Tuning": "arXiv 2402.00518",
    "expected calibration error": "arXiv 1706.04599",
    "Fisher": "Good, Permutation, Parametric and Bootstrap Tests of Hypotheses",
    "FlashAttention": "arXiv 2205.14135",
    "FlashAttention 2": "arXiv 2307.08691",
    "FlashAttention 3": "arXiv 2407.08608",
    "FREE": "arXiv 2310.05424",
    "Hoeffding": "arXiv 2110.01052",
    "Holm": "1979",
    "LayerSkip": "arXiv 2404.16710",
    "learn then test": "arXiv 2110.01052",
    "LEDE": "arXiv 2606.03113",
    "McNemar": "1947",
    "MiMo": "arXiv 2505.07608",
    "percentile bootstrap": "Efron and Tibshirani",
    "Ring Attention": "arXiv 2310.01889",
    "RMSNorm": "arXiv 1910.07467",
    "ROUGE-L": "Lin, 2004",
    "SpecEE": "arXiv 2504.08850",
    "speculative sampling": "arXiv 2211.17192",
    "SQuAD": "arXiv 1606.05250",
    "vAttention": "arXiv 2405.04437",
    "Young": "1974",
    "ZB-H1": "arXiv 2401.10241",
    "zero-bubble": "arXiv 2401.10241",
}
"""By the name of a work what its source contains. EAGLE has a paper for each version."""


def without_source(trees: Mapping[str, ast.Module]) -> list[str]:
    """The works that a docstring, or the text below a field or a constant, names although neither
    it nor the docstring of its module has their source: file, line and work of each."""
    return [
        f"{path}:{line} {work}"
        for path, tree in trees.items()
        for line, text in _texts(tree)
        for work in _named(text)
        if SOURCES[work] not in f"{text} {_in_one_line(ast.get_docstring(tree) or '')}"
    ]


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.lineno, _in_one_line(str(node.value.value))


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _named(text: str) -> list[str]:
    """The works that a text names, the longest name of each: not FlashAttention in FlashAttention
    2."""
    found = {}
    for work in sorted(SOURCES, key=len, reverse=True):
        pattern = rf"\b{_pattern(work)}\b"
        if re.search(pattern, text):
            found[work] = text = re.sub(pattern, "", text)
    return sorted(found)


def _pattern(work: str) -> str:
    """A name with hyphens or spaces, in the middle of a sentence or at its beginning."""
    first, rest = work[0], re.sub("[ -]", "[ -]", work[1:])
    return f"[{first}{first.upper()}]{rest}"
