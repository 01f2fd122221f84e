"""The tokens that penalties are for, counted while a text grows."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.modes.token_counts import TokenCounts

tokens = st.lists(st.integers(0, 6), max_size=12)


@given(tokens, tokens, st.lists(tokens, min_size=1, max_size=5), st.randoms())
def test_counts_are_those_of_the_whole_text(prompt, generated, drafts, random):
    counts = TokenCounts(prompt)
    length = 0
    for behind in drafts:
        length = random.randint(length, len(generated))
        seen, often = counts.of(generated[:length], behind)
        found = dict(zip(seen, often, strict=True))
        expected = Counter([*generated[:length], *behind])
        assert len(found) == len(seen)
        assert found == {**dict.fromkeys(prompt, 0), **expected}
