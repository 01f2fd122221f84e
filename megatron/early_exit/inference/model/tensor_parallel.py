"""A model divided over the ranks of one tensor-parallel group.

Each rank has a part of the attention heads and of the MLPs' inner entries, and adds its part of
what they give to the residual stream, which all ranks have whole. A projection to the vocabulary
is computed by rows, and the logits are gathered; its matrix is in every rank's memory whole, as
the embedding that it may be. All ranks see the same bits, so they decide alike without a word.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.model.linear import Function

_DIVIDED_BY_ROWS = ("linear_qkv.weight", "linear_qkv.weight_scale", "linear_qkv.bias")
_DIVIDED_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_GATED = ("linear_fc1.weight", "linear_fc1.weight_scale", "linear_fc1.bias")


def _reduce(part: Tensor, group_name: str) -> Tensor:
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(part, "sum", group_name))


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The group, and this rank's place in it.

    Attributes:
        group: the ranks that hold one model, or one stage of it, together.
        rank: of this process in the group.
        size: ranks of the group, 2 or more.
    """

    group: distributed.ProcessGroup
    rank: int
    size: int

    def architecture(self, whole: Architecture) -> Architecture:
        """The shape of this rank's part.

        Raises:
            ValueError: the model cannot be divided by that many ranks.
        """
        for name in ("num_query_groups", "ffn_hidden_size"):
            if getattr(whole, name) % self.size:
                raise ValueError(
                    f"tensor_parallel {self.size} is not possible, allowed: divisors of the "
                    f"model's {name} {getattr(whole, name)}"
                )
        return replace(
            whole,
            num_attention_heads=whole.num_attention_heads // self.size,
            num_query_groups=whole.num_query_groups // self.size,
            ffn_hidden_size=whole.ffn_hidden_size // self.size,
        )

    def weight(self, name: str, whole: Tensor, gated: bool) -> Tensor:
        """This rank's part of a layer's tensor; others are whole on every rank.

        Args:
            name: of the tensor, see `megatron.early_exit.checkpoint.weights`.
            whole: a matrix [outputs, inputs], or a vector [outputs] of scales or biases.
            gated: MLPs are gated.

        Returns:
            Of what is divided by rows [outputs / size, inputs] or [outputs / size], of what is
            divided by columns [outputs, inputs / size].
        """
        if name.endswith(_DIVIDED_BY_ROWS):
            return self._part(whole, dim=0)
        if name.endswith(_DIVIDED_BY_COLUMNS):
            return self._part(whole, dim=1)
        if name.endswith(_GATED):
            halves = whole.chunk(2) if gated else (whole,)
            return torch.cat([self._part(half, dim=0) for half in halves])
        return whole

    def _part(self, whole: Tensor, dim: int) -> Tensor:
        return whole.chunk(self.size, dim)[self.rank].clone()

    def rows(self, projection: Tensor) -> Tensor:
        """This rank's rows of a projection [v, h], or of its scales [v]; each rank has as many, the
        last ones zeros."""
        count = -(-len(projection) // self.size)
        rows = projection[self.rank * count : (self.rank + 1) * count]
        if len(rows) == count:
            return rows
        return torch.cat((rows, rows.new_zeros(count - len(rows), *rows.shape[1:])))

    def reduce(self, part: Tensor) -> Tensor:
        """The sum of what the ranks have, of any shape; `part` is written over."""
        distributed.all_reduce(part, group=self.group)
        return part

    @property
    def traceable_reduce(self) -> Function:
        """The same as `reduce` in operators that a compiler takes as they are."""
        return partial(_reduce, group_name=self.group.group_name)

    def gather(self, part: Tensor, vocab_size: int) -> Tensor:
        """Logits [n, v] from those of each rank's rows."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)[:, :vocab_size]

    def traceable_gather(self, part: Tensor, vocab_size: int) -> Tensor:
        """The same as `gather` in operators like those of `traceable_reduce`: logits [n, v] from
        those of each rank's rows."""
        operators = torch.ops._c10d_functional
        gathered = operators.wait_tensor(
            operators.all_gather_into_tensor(part.contiguous(), self.size, self.group.group_name)
        )
        # The ranks are one after another, each with all rows.
        by_rank = gathered.view(self.size, *part.shape)
        return by_rank.transpose(0, 1).flatten(1)[:, :vocab_size]
