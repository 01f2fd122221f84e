"""A small MiMo: a Qwen2 and one layer that predicts the token after the next, computed with nothing
but PyTorch, as MiMo's own class and SGLang do (without SGLang's zeros at position 0)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tests.helpers.huggingface_models import change_config, make_hf_reference, save_hf_reference

PREFIX = "model.mtp_layers.0."
_WEIGHTS = "model.safetensors"


class TinyMiMo:
    """A random model.

    Attributes:
        backbone: transformers' Qwen2.
        layer: tensors of the layer, by their names without `PREFIX`.
    """

    def __init__(self, **changed: Any) -> None:
        self.backbone = make_hf_reference("Qwen2", **changed)
        config = self.backbone.config
        self.sizes = config.num_attention_heads, config.num_key_value_heads
        self.eps: float = config.rms_norm_eps
        self.base: float = config.rope_parameters["rope_theta"]
        generator = torch.Generator().manual_seed(7)
        like = {
            name.removeprefix("model.layers.0."): tensor.shape
            for name, tensor in self.backbone.state_dict().items()
            if name.startswith("model.layers.0.")
        }
        size = config.hidden_size
        norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
        like |= {f"{name}.weight": torch.Size([size]) for name in norms}
        like["input_proj.weight"] = torch.Size([size, 2 * size])
        self.layer = {
            name: 0.3 * torch.randn(shape, generator=generator) + ("norm" in name)
            for name, shape in like.items()
        }

    def save(self, folder: Path, **config: Any) -> Path:
        """Write it as its makers do."""
        save_hf_reference(self.backbone, folder)
        tensors = load_file(folder / _WEIGHTS)
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in self.layer.items()}
        save_file(tensors, folder / _WEIGHTS)
        own = {
            "architectures": ["MiMoForCausalLM"],
            "model_type": "mimo",
            "attention_bias": True,
            "num_nextn_predict_layers": 1,
        }
        change_config(folder, **{**own, **config})
        return folder

    @torch.inference_mode()
    def look_ahead(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """The layer's hidden states [s - 1, h] of all tokens but the last, and its logits
        [s - 1, v] for the token after the next."""
        # Behind the final norm.
        hidden = self.backbone.model(torch.tensor([tokens])).last_hidden_state[0, :-1]
        embedding = self.backbone.model.embed_tokens(torch.tensor(tokens[1:]))
        both = self._norm("hidden_layernorm", hidden), self._norm("token_layernorm", embedding)
        stream = torch.cat(both, dim=-1) @ self.layer["input_proj.weight"].T
        stream = stream + self._attend(self._norm("input_layernorm", stream))
        inner = self._norm("post_attention_layernorm", stream)
        gate, up = (inner @ self.layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        stream = stream + (functional.silu(gate) * up) @ self.layer["mlp.down_proj.weight"].T
        found = self._norm("final_layernorm", stream)
        return found, self.backbone.lm_head(found)

    def _norm(self, name: str, rows: Tensor) -> Tensor:
        scale = (rows.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return rows * scale * self.layer[f"{name}.weight"]

    def _attend(self, rows: Tensor) -> Tensor:
        heads, groups = self.sizes
        queries, keys, values = (self._project(name, rows) for name in "qkv")
        length, size = len(rows), queries.shape[1] // heads
        queries = self._rotate(queries.view(length, heads, size))
        keys = self._rotate(keys.view(length, groups, size)).repeat_interleave(heads // groups, 1)
        values = values.view(length, groups, size).repeat_interleave(heads // groups, 1)
        scores = torch.einsum("ihd,jhd->hij", queries, keys) / size**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        mixed = torch.einsum("hij,jhd->ihd", shares, values).flatten(1)
        return mixed @ self.layer["self_attn.o_proj.weight"].T

    def _project(self, name: str, rows: Tensor) -> Tensor:
        prefix = f"self_attn.{name}_proj."
        return rows @ self.layer[f"{prefix}weight"].T + self.layer[f"{prefix}bias"]

    def _rotate(self, heads: Tensor) -> Tensor:
        """[s, n, d]"""
        length, _, size = heads.shape
        frequencies = self.base ** -(torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(length), frequencies)[:, None]
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
