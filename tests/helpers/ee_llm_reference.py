"""EE-LLM's forward pass on its own state dict, as its code computes it on one rank.

For RMSNorm, RoPE, SwiGLU and no biases. It knows nothing of this package's names.
"""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class EeLlmReference:
    """A model from the file that one rank saved.

    Args:
        state: the content of `mp_rank_00/model_optim_rng.pt`.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.args: Namespace = state["args"]
        self.model = state["model"]["language_model"]
        self.encoder: dict[str, Tensor] = self.model["encoder"]

    def logits(self, tokens: Tensor) -> dict[int | str, Tensor]:
        """Logits [s, v] by number of the exit layer, and `final`, with padding of the vocabulary.

        Args:
            tokens: [s].
        """
        found: dict[int | str, Tensor] = {}
        embedding = self.model["embedding"]["word_embeddings"]["weight"]
        hidden = embedding[tokens]
        for index in range(self.args.num_layers):
            is_exit = index + 1 in self.args.exit_layer_nums
            if is_exit and self.args.pre_exit:
                found[index + 1] = self.exit(index, hidden, embedding)
            prefix = f"layers.{index}."
            hidden = self.attend(prefix, hidden)
            normed = self.norm(f"{prefix}post_attention_norm", hidden)
            trunk = f"{prefix}mlp."
            at_exit = None
            if is_exit and self.args.use_exit_mlp:
                at_exit = hidden + self.mlp(f"{prefix}mlp.branch.", normed)
                trunk = f"{prefix}mlp.trunk."
            hidden = hidden + self.mlp(trunk, normed)
            if is_exit and not self.args.pre_exit:
                found[index + 1] = self.exit(
                    index, hidden if at_exit is None else at_exit, embedding
                )
        final = self.norm("final_norm", hidden)
        found["final"] = final @ self.model["output_layer"]["weight"].T
        return found

    def exit(self, index: int, hidden: Tensor, embedding: Tensor) -> Tensor:
        """The logits of an exit: its block, norm and projection."""
        prefix = f"layers.{index}."
        if self.args.use_exit_block:
            hidden = self.attend(f"{prefix}exit_block.", hidden)
            normed = self.norm(f"{prefix}exit_block.post_attention_norm", hidden)
            hidden = hidden + self.mlp(f"{prefix}exit_block.mlp.", normed)
        if self.args.use_exit_norm:
            hidden = self.norm(f"{prefix}exit_norm", hidden)
        if self.args.untie_exit_output_weights:
            place = self.args.exit_layer_nums.index(index + 1)
            embedding = self.model["exit_output_layer"][f"{place}.weight"]
        return hidden @ embedding.T

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        """RMSNorm."""
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.args.norm_epsilon)
        return hidden * scale * self.encoder[f"{name}.weight"]

    def mlp(self, prefix: str, hidden: Tensor) -> Tensor:
        """SwiGLU, without the residual."""
        gate, up = (hidden @ self.encoder[f"{prefix}dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        return (functional.silu(gate) * up) @ self.encoder[f"{prefix}dense_4h_to_h.weight"].T

    def attend(self, prefix: str, hidden: Tensor) -> Tensor:
        """Attention with its norm and residual."""
        heads, size = self.args.num_attention_heads, self.args.kv_channels
        groups = self.args.num_query_groups if self.args.group_query_attention else heads
        share = heads // groups
        mixed = (
            self.norm(f"{prefix}input_norm", hidden)
            @ self.encoder[f"{prefix}self_attention.query_key_value.weight"].T
        )
        mixed = mixed.view(len(hidden), groups, (share + 2) * size)
        query, key, value = mixed.split([share * size, size, size], dim=-1)
        query = self.rotate(query.reshape(len(hidden), heads, size))
        key = self.rotate(key).repeat_interleave(share, dim=1)
        value = value.repeat_interleave(share, dim=1)
        out = functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in (query, key, value)), is_causal=True
        )
        out = out.transpose(0, 1).reshape(len(hidden), heads * size)
        return hidden + out @ self.encoder[f"{prefix}self_attention.dense.weight"].T

    def rotate(self, values: Tensor) -> Tensor:
        """Rotary position embedding of [s, heads, size], halves turned against each other."""
        size = values.shape[-1]
        frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(len(values))[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        first, second = values.chunk(2, dim=-1)
        return values * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
