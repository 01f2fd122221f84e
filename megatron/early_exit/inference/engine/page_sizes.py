"""Bytes of a page of the caches: of one that is stored, and of one in a slot of a GPU."""

from dataclasses import dataclass

from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.model.segmented_model import SegmentedModel


@dataclass(frozen=True, slots=True)
class SlotPieces:
    """The pieces in which slots on a GPU take memory.

    Attributes:
        size: bytes of a piece.
        pages_at_once: pages of an attention that fit into one.
        page_bytes: what a page takes then in each segment, with what is left free in pieces.
    """

    size: int
    pages_at_once: int
    page_bytes: tuple[int, ...]

    @classmethod
    def of(cls, model: SegmentedModel, size: int) -> "SlotPieces":
        """Those of a model, or of this process's part of it."""
        key_values, hidden = _position_bytes(model)
        at_once = max(size // (PAGE_SIZE * key_values), 1)

        def whole(position: int) -> int:
            return -(-at_once * PAGE_SIZE * position // size) * size

        sizes = _segment_sizes(model, whole(key_values), whole(hidden))
        return cls(size, at_once, tuple(-(-one // at_once) for one in sizes))

    @property
    def num_positions(self) -> int:
        """That a sequence takes at a time."""
        return self.pages_at_once * PAGE_SIZE


def page_bytes(model: SegmentedModel, page_size: int = PAGE_SIZE) -> tuple[int, ...]:
    """Bytes of a page in each segment of a model, or of this process's part of it: keys and values
    of its attentions, and what is kept at the exit behind it; in the last one also those of the
    multi-token-prediction module."""
    sizes = _segment_sizes(model, *_position_bytes(model))
    return tuple(page_size * size for size in sizes)


def _position_bytes(model: SegmentedModel) -> tuple[int, int]:
    """Of the keys and values of an attention, and of a hidden state."""
    shape, width = model.architecture, model.dtype.itemsize
    return 2 * shape.num_query_groups * shape.kv_channels * width, shape.hidden_size * width


def _segment_sizes(model: SegmentedModel, key_values: int, hidden: int) -> list[int]:
    """What each segment takes, with the exit behind it.

    Args:
        model: the model, or this process's part of it.
        key_values: what those of an attention take.
        hidden: what hidden states take.
    """
    sizes = [len(segment.attentions) * key_values for segment in model.segments]
    for index, exit_ in enumerate(model.exits):
        sizes[index] += hidden + (0 if exit_.head.block is None else key_values)
    # Each depth of the multi-token-prediction module has keys and values, and what it begins with.
    sizes[-1] += len(model.mtp) * (hidden + key_values)
    return sizes
