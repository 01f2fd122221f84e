"""The pages of the Python interface: mkdocstrings fills them from docstrings."""

from __future__ import annotations

from tools.docs_site.public_names import PUBLIC, Page


def python_pages() -> dict[str, str]:
    """The pages in Markdown, by their paths in the site's sources."""
    return {f"reference/python/{name}.md": _page(page) for name, page in PUBLIC.items()}


def _page(page: Page) -> str:
    parts = [f"# {page.title}", page.text]
    for module, names in page.names.items():
        parts += [f"::: {module}.{name}" for name in names]
    return "\n\n".join(parts) + "\n"
