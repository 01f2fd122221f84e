"""The pictures of docs/concepts.md are those that the script beside them draws."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_pictures_are_drawn_by_the_script():
    spec = spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = re.findall(r"\(pictures/(\w+)\.svg\)", (DOCS / "concepts.md").read_text())
    assert sorted(shown) == sorted(script.PICTURES)
    for name, draw in script.PICTURES.items():
        drawn = draw().svg()
        assert (DOCS / "pictures" / f"{name}.svg").read_text() == drawn, name
        ElementTree.fromstring(drawn)
