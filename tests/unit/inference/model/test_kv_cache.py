"""Keys and values come back where they were written, and attention sees no more than it may."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from megatron.early_exit.inference.model.kv_cache import KVCache, Span, in_pass_order
from megatron.early_exit.inference.model.passes import Pass

SLOTS, CAPACITY, SIZE = 5, 12, 4


@st.composite
def lengths(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Slot, positions already cached, and new ones, of some sequences."""
    slots = draw(st.lists(st.integers(0, SLOTS - 1), unique=True, min_size=1))
    spans = []
    for slot in slots:
        end = draw(st.integers(1, CAPACITY))
        spans.append((slot, draw(st.integers(0, end - 1)), end))
    return spans


@settings(max_examples=100)
@given(spans=lengths(), groups=st.integers(1, 2), per_group=st.integers(1, 3), last=st.booleans())
def test_attention_of_any_batch_is_that_of_each_sequence_alone(spans, groups, per_group, last):
    generator = torch.Generator().manual_seed(0)
    heads = groups * per_group
    cache = KVCache(2, SLOTS, CAPACITY, groups, SIZE, torch.float32, torch.device("cpu"))
    # What other sequences have left must not matter, as long as it is finite.
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    full = {slot: torch.randn(end, 2 * groups, SIZE, generator=generator) for slot, _, end in spans}
    for slot, start, _ in spans:
        cache.data[1, slot, :start] = full[slot][:start]
    ordered = sorted((Span(*span) for span in spans), key=in_pass_order)
    this = Pass(cache, ordered, None, heads, last_only=last)
    new = torch.cat([full[slot][start:end] for slot, start, end in ordered])
    queries = [
        torch.randn(end - start, heads, SIZE, generator=generator) for _, start, end in ordered
    ]
    found = this.attend(1, torch.cat((torch.cat(queries), new), dim=1).flatten(1), 0.5)
    expected = []
    for (slot, start, end), own in zip(ordered, queries, strict=True):
        keys, values = full[slot].transpose(0, 1).split(groups)
        seen = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        attended = functional.scaled_dot_product_attention(
            own.transpose(0, 1), keys, values, attn_mask=seen, scale=0.5, enable_gqa=True
        )
        own_rows = attended.transpose(0, 1).flatten(1)
        expected.append(own_rows[-1:] if last else own_rows)
    torch.testing.assert_close(found, torch.cat(expected))
    for slot, _, end in spans:
        torch.testing.assert_close(cache.data[1, slot, :end], full[slot])


def test_a_pass_goes_on_in_the_cache_of_the_next_segment():
    generator = torch.Generator().manual_seed(0)
    caches = [
        KVCache(count, 3, CAPACITY, 1, SIZE, torch.float32, torch.device("cpu")) for count in (1, 2)
    ]
    spans = (Span(0, 4, 5), Span(2, 0, 3))
    qkv = torch.randn(4, 4 * SIZE, generator=generator)
    this = Pass(caches[0], spans, None, 2)
    first = this.attend(0, qkv, None)
    this.move_to(caches[1])
    assert torch.equal(this.attend(1, qkv, None), first)
    assert torch.equal(caches[1].data[1], caches[0].data[0])
    # Another pass may use the space again, where it has as many rows.
    again = Pass(caches[0], spans, None, 2, workspace=this.workspace)
    assert again.workspace is this.workspace
    assert torch.equal(again.attend(0, qkv, None), first)
    assert Pass(caches[0], spans[:1], None, 2, workspace=this.workspace).workspace.count == 1
