"""How long the kernels of a layer take on one accelerator.

A product of two matrices is computed in tiles, one on each processor at a time, and the last of its
waves of tiles is half full on average. Its operands and its result move at the bandwidth of the
memory, in part beside the computation. Attention that is written out counts all of its matrix
(scores, softmax, dropout); in one kernel (flash), it counts what is not masked. All else is bound
by memory.
"""

from dataclasses import dataclass

from megatron.early_exit.planner.costs.hardware import MEMORY_SHARE, Accelerator

# Rows and columns of the tiles that libraries compute large products in.
_TILE_ENTRIES = 128 * 256
# Of the shorter of computing and moving: what does not run beside the other, as the loads that the
# first tiles wait for and the results of the last. An assumption: neither all of it nor nothing.
_UNHIDDEN = 0.5

# Of the peak, in one kernel: FlashAttention-2 (arXiv 2307.08691) reaches 0.5 to 0.73 of an A100's
# in its forward and 0.5 to 0.63 in its backward with long sequences, and FlashAttention-3 (arXiv
# 2407.08608) tells of similar shares with cuDNN on an H100; with masks less.
_FLASH_SHARE = 0.5
_FLASH_BACKWARD = 2.5
"""Its backward has five products for the forward's two."""

# Bytes of each entry of a written attention matrix, read or written by a pass: of the scores'
# product 2, of the softmax 2 + 2, of the product with the values 2; in backward of the product's
# gradients 2 + 2, of the softmax 2 + 2 + 2, and of the gradients of queries and keys 2 + 2.
_MATRIX_FORWARD, _MATRIX_BACKWARD = 8, 14
# Dropout reads, writes, and writes its mask; in backward it reads the mask.
_MATRIX_DROPOUT = 5


@dataclass(frozen=True)
class Kernels:
    """Seconds of operations on one accelerator.

    Attributes:
        accelerator: that they run on.
        product_share: of its peak that large products reach.
    """

    accelerator: Accelerator
    product_share: float

    def product_s(
        self,
        rows: float,
        inner: float,
        columns: float,
        result_bytes: int = 2,
        in_fp8: bool = False,
        number: float = 1,
    ) -> float:
        """Seconds of a product of a rows x inner and an inner x columns matrix.

        Args:
            rows: number of rows of the first matrix.
            inner: columns of the first, rows of the second.
            columns: number of columns of the second matrix.
            result_bytes: moved for each entry of the result: 2 to write it, 8 to add it to fp32.
            in_fp8: both matrices are in FP8 instead of bf16.
            number: how many such products there are, which share the waves of tiles.
        """
        flops = 2 * number * rows * inner * columns
        tiles = number * rows * columns / _TILE_ENTRIES
        waves = 1 + self.accelerator.num_processors / 2 / tiles
        moved = (1 if in_fp8 else 2) * inner * (rows + columns) + result_bytes * rows * columns
        computed_s = self._flops_s(flops * waves, self.product_share, in_fp8)
        moved_s = self.memory_s(number * moved)
        return max(computed_s, moved_s) + _UNHIDDEN * min(computed_s, moved_s)

    def memory_s(self, num_bytes: float) -> float:
        """Seconds to read and write so many bytes together."""
        return num_bytes / (MEMORY_SHARE * self.accelerator.memory_bytes_per_s)

    def flash_s(self, flops: float) -> tuple[float, float]:
        """Forward and backward of attention in one kernel, of so many operations in forward."""
        forward_s = self._flops_s(flops, _FLASH_SHARE)
        return forward_s, _FLASH_BACKWARD * forward_s

    def written_attention_s(
        self, flops: float, entries: float, has_dropout: bool
    ) -> tuple[float, float]:
        """Forward and backward of attention whose matrix has so many entries, and which takes so
        many operations in forward."""
        dropout = _MATRIX_DROPOUT * has_dropout
        products_s = self._flops_s(flops, self.product_share)
        return (
            products_s + self.memory_s(entries * (_MATRIX_FORWARD + dropout)),
            2 * products_s + self.memory_s(entries * (_MATRIX_BACKWARD + dropout)),
        )

    def _flops_s(self, flops: float, share: float, in_fp8: bool = False) -> float:
        peak = self.accelerator.fp8_flops_per_s if in_fp8 else self.accelerator.flops_per_s
        if peak is None:
            raise ValueError("products in FP8 need an accelerator that has them")
        return flops / (share * peak)
