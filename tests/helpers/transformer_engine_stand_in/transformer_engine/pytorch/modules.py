"""Linear layers, norms and attention, which remember the formats they were run and built in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

_LARGEST_E4M3 = 448


def _name(recipe: object) -> str | None:
    return None if recipe is None else type(recipe).__name__


def _rounded(values: Tensor) -> Tensor:
    """Values in E4M3, scaled to its range; the gradient passes as if they were not rounded."""
    scale = _LARGEST_E4M3 / values.detach().abs().amax().clamp(min=1e-12)
    rounded = (values.detach() * scale).to(torch.float8_e4m3fn).to(values.dtype) / scale
    return values + (rounded - values).detach()


class Linear(nn.Module):
    """x W^T + b.

    Attributes:
        formats: the recipes of its forward passes, by name; None is the parameters' own format.
        built_in: the recipe that its weight was built for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        init_method: Callable[[Tensor], Any] | None = None,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        tp_size: int = 1,
        **_: object,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "the stand-in has no tensor parallelism"
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.tp_size = bias, tp_size
        self.parallel_mode = parallel_mode
        self.return_bias = return_bias
        self.save_original_input = False
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        parallel = get_rng_state_tracker().fork() if get_rng_state_tracker else nullcontext()
        with parallel:
            if init_method is not None:
                init_method(self.weight)
        self.bias = Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        self.formats: list[str | None] = []
        self.built_in = _name(FP8GlobalStateManager.init_recipe)

    def get_extra_state(self) -> Tensor:
        """The statistics of delayed scaling, of which there are none here."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None: ...

    def set_tensor_parallel_group(self, group: object) -> None: ...

    def forward(self, values: Tensor, is_first_microbatch: bool | None = None) -> Any:
        recipe = FP8GlobalStateManager.recipe
        self.formats.append(_name(recipe))
        weight = self.weight
        if recipe is not None:
            values, weight = _rounded(values), _rounded(weight)
        result = values @ weight.t()
        if self.return_bias:
            return result, self.bias
        return result if self.bias is None else result + self.bias


class LayerNormLinear(Linear):
    """A norm before a linear layer, whose parameters have a prefix here."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **linear: Any,
    ) -> None:
        assert not zero_centered_gamma
        assert not return_layernorm_output
        super().__init__(in_features, out_features, **linear)
        dtype = self.weight.dtype
        self.eps = eps
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=dtype))
        if normalization == "LayerNorm":
            self.layer_norm_bias: Parameter | None = Parameter(
                torch.zeros(in_features, dtype=dtype)
            )
        else:
            self.layer_norm_bias = None

    def forward(self, values: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = _norm(values, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, is_first_microbatch)


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **_: object,
    ) -> None:
        assert not zero_centered_gamma
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        self.bias: Parameter | None = None

    def forward(self, values: Tensor) -> Tensor:
        return _norm(values, self.weight, self.bias, self.eps)


class LayerNorm(RMSNorm):
    def __init__(self, normalized_shape: int, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        self.bias = Parameter(torch.zeros_like(self.weight))


def _norm(values: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    shape = (values.shape[-1],)
    if bias is None:
        return functional.rms_norm(values, shape, weight, eps)
    return functional.layer_norm(values, shape, weight, bias, eps)


class DotProductAttention(nn.Module):
    """Causal attention of [s, b, heads, d] tensors."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.dropout, self.scale = attention_dropout, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Any:
        parts = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        result = functional.scaled_dot_product_attention(
            *parts,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return result.permute(2, 0, 1, 3).flatten(2)


class GroupedLinear(nn.Module):
    """The experts' linear layers, which no model here has."""
