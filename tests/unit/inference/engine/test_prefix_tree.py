"""Stored pages are found by all the tokens before their ends, and go in the order of their use."""

from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.engine.prefix_tree import PrefixTree

SIZE = 2
TOKENS = st.lists(st.integers(0, 1), max_size=9)


def found(tree: PrefixTree, tokens: list[int]) -> int:
    return len(tree.match(tokens))


@given(texts=st.lists(TOKENS, max_size=6), asked=TOKENS)
def test_a_text_finds_the_pages_with_which_a_stored_one_begins(texts, asked):
    tree = PrefixTree(SIZE)
    for text in texts:
        tree.add(text)
    whole = len(asked) // SIZE
    known = [
        n for n in range(whole + 1) if any(text[: n * SIZE] == asked[: n * SIZE] for text in texts)
    ]
    expected = max((n for n in known if any(len(t) >= n * SIZE for t in texts)), default=0)
    assert found(tree, asked) == expected
    pages = {tuple(t[:end]) for t in texts for end in range(SIZE, len(t) + 1, SIZE)}
    assert len(tree) == len(pages)


@given(texts=st.lists(TOKENS, min_size=1, max_size=6), asked=st.lists(TOKENS, max_size=6))
def test_the_page_unused_for_longest_goes_first_and_has_none_below_it(texts, asked):
    tree = PrefixTree(SIZE)
    last_use = {}
    for turn, (text, is_new) in enumerate([(t, True) for t in texts] + [(t, False) for t in asked]):
        pages = tree.add(text) if is_new else tree.match(text)
        last_use |= {page.number: turn for page in pages}
    uses = []
    while (page := tree.oldest()) is not None:
        uses.append(last_use[page.number])
        assert not page.children
        tree.remove(page)
        assert not page.is_stored
    assert uses == sorted(uses)
    assert len(tree) == 0


def test_pages_whose_blocks_have_not_seen_them_are_not_for_those_who_ask_the_blocks():
    tree = PrefixTree(SIZE)
    first, second = tree.add([1, 2, 3, 4])
    first.blocks, second.blocks = frozenset({0, 1}), frozenset({1})
    assert tree.match([1, 2, 3, 4], {0}) == [first]
    assert tree.match([1, 2, 3, 4], {1}) == [first, second]
    assert tree.match([1, 2, 3, 4]) == [first, second]
