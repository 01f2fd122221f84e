"""Build the documentation's site in build/site:

    python -m tools.docs_site

ends with an error where a link leads nowhere, or a page is not in the navigation of mkdocs.yml."""

from __future__ import annotations

import sys

from tools.docs_site.flags_page import REPOSITORY
from tools.docs_site.site import build


def main() -> int:
    """Build the site; returns the exit status."""
    try:
        site = build(REPOSITORY / "build")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The documentation is in {site.relative_to(REPOSITORY)}: open {site}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
