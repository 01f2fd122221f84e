"""Pages of past sequences that new ones with the same beginning need not compute. Holds numbers, no
tensors."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(slots=True, eq=False)
class StoredPage:
    """Keys and values of a page of tokens, behind exactly those of the pages above it in the tree.

    Attributes:
        number: names the page in the store.
        depth: segments, from the first one on, that have seen its positions.
        blocks: exits whose blocks have seen them.
        is_stored: it has not been removed.
    """

    number: int
    depth: int = 0
    blocks: frozenset[int] = frozenset()
    is_stored: bool = True
    parent: "StoredPage | None" = None
    tokens: tuple[int, ...] = ()
    children: dict[tuple[int, ...], "StoredPage"] = field(default_factory=dict)


class PrefixTree:
    """Stored pages by the tokens from the beginning of a text to their ends.

    Tokens are compared, not hashes of them, so no page is ever taken for another. The page whose
    last use is longest ago is the first to go. Whoever uses a page uses those above it, so none of
    them ever goes before one below.

    Args:
        page_size: positions of a page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._root = StoredPage(-1)
        self._by_use: OrderedDict[int, StoredPage] = OrderedDict()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._by_use)

    def pages_of(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The tokens of each whole page of a text."""
        size = self._page_size
        for end in range(size, len(tokens) + 1, size):
            yield tuple(tokens[end - size : end])

    def match(self, tokens: Sequence[int], blocks: Collection[int] = ()) -> list[StoredPage]:
        """The stored pages with which a text begins.

        Args:
            tokens: the text.
            blocks: exits whose blocks have to have seen the pages.
        """
        page, found = self._root, []
        for own in self.pages_of(tokens):
            child = page.children.get(own)
            if child is None or not child.blocks.issuperset(blocks):
                break
            found.append(child)
            page = child
        self._use(found)
        return found

    def add(self, tokens: Sequence[int]) -> list[StoredPage]:
        """The pages of a text, whole pages only; those that are new have depth 0."""
        page, path = self._root, []
        for own in self.pages_of(tokens):
            child = page.children.get(own)
            if child is None:
                child = StoredPage(next(self._numbers), parent=page, tokens=own)
                page.children[own] = child
                self._by_use[child.number] = child
            path.append(child)
            page = child
        self._use(path)
        return path

    def oldest(self) -> StoredPage | None:
        """The page that is to go first; None where there is none."""
        return next(iter(self._by_use.values()), None)

    def remove(self, page: StoredPage) -> None:
        """Forget a page, which has none below it."""
        assert not page.children
        assert page.parent is not None
        page.is_stored = False
        del self._by_use[page.number], page.parent.children[page.tokens]

    def _use(self, path: Sequence[StoredPage]) -> None:
        for page in reversed(path):
            self._by_use.move_to_end(page.number)
