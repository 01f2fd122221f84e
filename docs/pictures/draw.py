"""Draws the pictures of docs/concepts.md:

    python docs/pictures/draw.py

writes an SVG for each beside this file. They have a light ground of their own, so that they can be
read on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
INK, GREY, GROUND = "#1f2937", "#9ca3af", "#f8fafc"
# Of layers in front of the first exit, of the second one, and behind both.
FIRST, SECOND, LAST = "#86c5a4", "#8bb8e8", "#f2b8a0"
EXIT, MISSING, DRAFT = "#fde68a", "#ffffff", "#d8b4fe"
FONT = "font-family='Helvetica, Arial, sans-serif'"


class Picture:
    """Shapes on a ground of `width` x `height` pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._width, self._height, self._title = width, height, title
        self._shapes: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        text: str = "",
        dash: str = "",
    ) -> None:
        """A box with a text in its middle; `dash="4 3"` draws its edge in dashes."""
        dashes = f" stroke-dasharray='{dash}'" if dash else ""
        self._shapes.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='4' fill='{fill}' "
            f"stroke='{INK}' stroke-width='1'{dashes}/>"
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, anchor="middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 14) -> None:
        """A line of text whose baseline is at `y`."""
        self._shapes.append(
            f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' font-size='{size}' fill='{INK}' "
            f"{FONT}>{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float], dash: str = "") -> None:
        """An arrow along points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = f" stroke-dasharray='{dash}'" if dash else ""
        self._shapes.append(
            f"<polyline points='{path}' fill='none' stroke='{INK}' stroke-width='1.5'"
            f"{dashes} marker-end='url(#tip)'/>"
        )

    def svg(self) -> str:
        """The picture as the text of an SVG file."""
        tip = (
            "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
            f"markerHeight='7' orient='auto'><path d='M0,0 L10,5 L0,10 z' fill='{INK}'/></marker>"
            "</defs>"
        )
        lines = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self._width} {self._height}' "
            f"width='{self._width}' role='img'>",
            f"<title>{escape(self._title)}</title>",
            tip,
            f"<rect width='{self._width}' height='{self._height}' rx='10' fill='{GROUND}' "
            f"stroke='{GREY}'/>",
            *self._shapes,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def colour(layer: int) -> str:
    """Fill colour of a layer, by its place before, between or behind the exits after layers 2 and
    4."""
    return FIRST if layer <= 2 else SECOND if layer <= 4 else LAST


def _left(layer: int) -> int:
    return 55 + 65 * layer + 10 * (layer > 2) + 10 * (layer > 4)


def exits() -> Picture:
    """A model with two exits, and where the tokens of a text leave it."""
    p = Picture(760, 330, "Eight layers with exits after layers 2 and 4")
    p.box(14, 90, 92, 40, GROUND, "embedding")
    for layer in range(1, 9):
        x = _left(layer)
        p.box(x, 90, 52, 40, colour(layer), f"layer {layer}")
        if layer in (2, 4, 8):
            p.arrow((x + 26, 90), (x + 26, 62))
            p.box(x - 26, 22, 104, 38, EXIT, f"exit {layer}" if layer < 8 else "final head")
    tokens = (("def", 2), (" main", 8), ("(", 2), ("):", 2), (" parser", 4), (" =", 2))
    p.text(20, 165, "Each token is given by the first exit that is confident enough:")
    for row, (token, depth) in enumerate(tokens):
        y = 178 + 23 * row
        p.text(104, y + 15, token.strip(), anchor="end")
        for layer in range(1, depth + 1):
            x = _left(layer)
            p.box(x, y, 52, 19, colour(layer))
    return p


def deferral() -> Picture:
    """How long a stage holds an exit's logits, without and with deferral."""
    p = Picture(760, 280, "An exit's logits are held from its forward to its backward pass")
    order = ("F0", "F1", "F2", "B0", "F3", "B1", "B2", "B3")
    for top, title, held in (
        (20, "exit computed in the forward pass: the logits of three microbatches at a time", True),
        (150, "exit deferred to the backward pass: those of one", False),
    ):
        p.text(20, top + 14, title)
        x, begin = 20.0, {}
        for one in order:
            kind, number = one[0], int(one[1])
            width = 55.0 if kind == "F" else 95.0
            p.box(x, top + 25, width, 28, FIRST if kind == "F" else LAST, one)
            if kind == "F":
                begin[number] = x
            else:
                start = begin[number] if held else x
                row = top + 60 + 13 * (number % 3)
                p.box(start, row, x + width - start, 10, EXIT)
            x += width + 4
    p.text(20, 268, "yellow: logits in memory. F: forward pass of a microbatch, B: backward pass")
    return p


def catch_up() -> Picture:
    """Which layers have keys and values of which positions."""
    p = Picture(760, 330, "Keys and values behind an exit: exact and propagated")
    depths = (8, 2, 2, 4, 8)
    for left, title in ((60, "exact: computed in one batch"), (430, "propagate: from the exit")):
        p.text(left, 28, title)
        for layer in range(1, 9):
            y = 260 - 27 * (layer - 1)
            if left == 60:
                p.text(52, y + 16, str(layer), anchor="end")
            for place, depth in enumerate(depths):
                x = left + 58 * place
                if layer <= depth:
                    p.box(x, y, 52, 22, colour(layer))
                elif left == 60:
                    p.box(x, y, 52, 22, colour(layer), "later", dash="4 3")
                else:
                    p.box(x, y, 52, 22, MISSING, "k, v", dash="4 3")
        for place in range(len(depths)):
            p.text(left + 58 * place + 26, 302, f"token {place + 1}", anchor="middle", size=12)
    p.text(16, 322, "layer", size=12)
    p.text(
        60,
        322,
        "Token 5 goes to layer 8: before it, the cells of tokens 2 to 4 are filled.",
        size=12,
    )
    return p


def regrouping() -> Picture:
    """Sequences of a batch between the segments of a model."""
    p = Picture(760, 280, "A batch is regrouped at every exit")
    for number, (x, name) in enumerate(
        ((30, "layers 1 and 2"), (285, "layers 3 and 4"), (540, "layers 5 to 8"))
    ):
        p.box(x, 50, 160, 140, (FIRST, SECOND, LAST)[number])
        p.text(x + 80, 42, name, anchor="middle")
    for row, name in enumerate("ABCD"):
        p.box(50, 62 + 31 * row, 120, 24, MISSING, f"sequence {name}")
    for row, name in enumerate("BD"):
        p.box(305, 62 + 31 * row, 120, 24, MISSING, f"sequence {name}")
    p.box(305, 124, 120, 24, DRAFT, "B: 2 earlier ones")
    p.box(560, 62, 120, 24, MISSING, "sequence D")
    p.arrow((190, 120), (285, 120))
    p.text(237, 112, "B, D", anchor="middle")
    p.arrow((445, 120), (540, 120))
    p.text(492, 112, "D", anchor="middle")
    p.arrow((110, 190), (110, 232), (14, 232), (14, 120), (30, 120))
    p.text(120, 228, "A and C have their token, and begin again with the next one")
    p.text(
        30,
        262,
        "violet: earlier positions of B, which left at the first exit and are needed now",
    )
    return p


def drafting() -> Picture:
    """Drafts of an exit, and of a head that looks ahead, and their verification."""
    p = Picture(760, 300, "Self-speculative decoding")
    p.text(20, 30, "an exit drafts: layers 1 and 2, once for each token")
    for place, word in enumerate(("for", "i", "in", "the")):
        p.box(20 + 82 * place, 42, 74, 30, FIRST, "1, 2")
        p.box(20 + 82 * place, 84, 74, 26, DRAFT, word)
    p.text(20, 142, "verified: layers 3 to 8, once for all of them")
    p.box(20, 152, 320, 34, LAST, "layers 3 to 8, four positions in one pass")
    for place, word in enumerate(("for", "i", "in", "range")):
        p.box(20 + 82 * place, 198, 74, 26, FIRST if place < 3 else EXIT, word)
    p.text(20, 250, "Three drafts are accepted; the fourth token is the full model's own.")
    p.text(20, 270, "The draft's layers are not run again.")
    p.text(420, 30, "a look-ahead head drafts: no layer is run")
    p.box(420, 42, 150, 30, LAST, "last hidden state")
    p.box(420, 84, 150, 26, GROUND, "newest token")
    p.arrow((570, 57), (610, 72))
    p.arrow((570, 97), (610, 84))
    p.box(610, 58, 120, 40, DRAFT, "one small layer")
    p.arrow((670, 98), (670, 126))
    p.box(610, 126, 120, 26, DRAFT, "draft")
    p.text(420, 190, "The same verification follows, by all layers.")
    p.text(420, 210, "Greedy texts are the full model's.")
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "exits": exits,
    "deferral": deferral,
    "catch_up": catch_up,
    "regrouping": regrouping,
    "drafting": drafting,
}


def main() -> None:
    """Write all pictures to the folder of this file."""
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
