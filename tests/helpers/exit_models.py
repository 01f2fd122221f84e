"""Small GPTs with exits in one process, and their expected gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.plain_loss import token_losses

LAYERS, HIDDEN, HEADS, VOCAB, SEQUENCE, BATCH = 4, 32, 4, 64, 12, 2
_OF_MODEL = ("tied", "holds_rows", "tunes_exits")


def build_model(exits: EarlyExitConfig, **backbone: Any) -> Any:
    """An EarlyExitGPTModel in training mode, without dropout unless `backbone` asks for it.

    `backbone` holds fields of Megatron's transformer config, `tied` for a final projection that is
    tied to the word embedding, `holds_rows` for layers that can hand on tokens unchanged, and
    `tunes_exits` for a frozen backbone."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from megatron.early_exit.model.gpt_builder import EarlyExitGPTModelConfig
    from megatron.early_exit.model.layer_specs import gpt_layer_spec

    fields = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "pipeline_dtype": torch.float32,
    } | {name: value for name, value in backbone.items() if name not in _OF_MODEL}
    config = EarlyExitGPTModelConfig(
        transformer=TransformerConfig(**fields),
        transformer_layer_spec=gpt_layer_spec,
        early_exit=exits,
        vocab_size=VOCAB,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=backbone.get("tied", True),
        holds_rows=backbone.get("holds_rows", False),
        tunes_exits=backbone.get("tunes_exits", False),
    )
    torch.manual_seed(3)
    (model,) = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        mixed_precision_wrapper=None,
    )
    return model.to(config.transformer.params_dtype)


@dataclass
class Microbatch:
    """Random tokens, labels and a loss mask with zeros, each [b, s]; `held` is what layers hand
    on."""

    seed: int
    held: Any = None
    tokens: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (BATCH, SEQUENCE)
        self.tokens = torch.randint(VOCAB, shape, generator=generator)
        self.labels = torch.randint(VOCAB, shape, generator=generator)
        self.mask = (torch.rand(shape, generator=generator) < 0.7).float()

    @property
    def positions(self) -> Tensor:
        return torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)

    @property
    def tokens_that_count(self) -> Tensor:
        return self.mask.sum().clamp(min=1)

    def final_loss(self, model: Any) -> Tensor:
        """Sum of the final head's losses over the tokens that count."""
        targets = {"labels": self.labels, "loss_mask": self.mask}
        if self.held is not None:
            targets["held"] = self.held
        losses = model(self.tokens, self.positions, None, **targets)
        return (losses.float() * self.mask_at(model.config.num_layers)).sum()

    def mask_at(self, position: int) -> Tensor:
        """The tokens that count at the exit at `position`, or at the final head, [b, s]."""
        if self.held is None:
            return self.mask
        return self.mask * (self.held.frozen_at >= position)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, by name, zeros for those that have none; clears them
    afterwards."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


class PlainExits:
    """The summed losses of a model with exits as one ordinary autograd graph.

    Hidden states are captured from the running backbone, the logits of all heads are in memory at
    the same time, and no code of the deferred loss is used."""

    def __init__(self, model: Any, exits: EarlyExitConfig) -> None:
        self.model = model
        self.exits = exits
        self.hidden: dict[int, Tensor] = {}

    def objective(self, batch: Microbatch, per_token: bool = False) -> Tensor:
        """Final loss plus weighted exit losses, means over tokens (or sums)."""
        total = self.run_backbone(batch)
        for position in self.exits.positions:
            total = total + self.exit_loss(position, batch)
        return total if per_token else total / batch.tokens_that_count

    def exit_loss(self, position: int, batch: Microbatch) -> Tensor:
        """Weighted loss of an exit that `run_backbone` has passed, a sum over tokens."""
        (one,) = (one for one in self.exits.exits if one.position == position)
        losses = token_losses(
            self._logits(position).flatten(0, 1),
            batch.labels.t().flatten(),
            temperature=one.temperature,
            confidence_weighted=self.exits.use_dynamic_exit_layer_weight,
        )
        return one.weight * (losses * batch.mask_at(position).t().flatten()).sum()

    def run_backbone(self, batch: Microbatch) -> Tensor:
        """The final head's loss, a sum over tokens."""
        hooks = [self._collect(position) for position in self.exits.positions]
        loss = batch.final_loss(self.model)
        for hook in hooks:
            hook.remove()
        return loss

    def _collect(self, position: int) -> Any:
        """Keep the branch's input: the layer's output, or with an exit MLP its MLP's residual."""
        layer = self.model.decoder.layers[position - 1]
        if self.exits.use_exit_mlp:
            return layer.pre_mlp_layernorm.register_forward_pre_hook(
                lambda _, args: self.hidden.update({position: args[0]})
            )
        return layer.register_forward_hook(
            lambda _, args, output: self.hidden.update({position: output[0]})
        )

    def _logits(self, position: int) -> Tensor:
        """[s, b, v]: mlp in place of the layer's, then block, norm and projection."""
        head, hidden = self.model.exits.heads[position], self.hidden[position]
        if self.exits.use_exit_mlp:
            output, bias = head.mlp(head.pre_mlp_layernorm(hidden))
            hidden = hidden + output + (0 if bias is None else bias)
        if self.exits.use_exit_block:
            rope = self.model.rotary_pos_emb(SEQUENCE)
            hidden, _ = head.block(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rope)
        if self.exits.use_exit_norm:
            hidden = head.norm(hidden)
        if self.exits.share_final_head:
            hidden = self.final_norm(position, hidden)
        weight = self.weight_of(position)
        return hidden.to(weight.dtype) @ weight.t()

    def weight_of(self, position: int) -> Tensor:
        """The output projection of an exit, [v, h]."""
        if self.exits.untie_exit_output_weights:
            return self.model.exits.heads[position].projection.weight
        if self.exits.share_final_head and not self.model.share_embeddings_and_output_weights:
            return self.model.output_layer.weight
        return self.model.embedding.word_embeddings.weight

    def final_norm(self, position: int, hidden: Tensor) -> Tensor:
        """The model's final norm, where an exit shares it, [s, b, h]."""
        normed: Tensor = self.model.decoder.final_layernorm(hidden)
        return normed
