"""A Megatron GPT with exits.

The exits live in `model.exits`, outside `decoder.layers`: the backbone keeps Megatron's own
checkpoint keys. Labels and loss mask reach an exit through the `context` and `context_mask`
arguments of the layers: a decoder has no cross attention, so Megatron passes both on unchanged, for
each microbatch, also through activation recomputation. Gates learn what the final head says later
in the same pass: on the chunk that has it, its tokens are written into a second row beside the
labels. Tokens that layers hand on (`held_rows`) are packed with the loss mask.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import is_pp_last_stage
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.backbone_parts import OUTPUT_LAYER, WORD_EMBEDDING
from megatron.early_exit.model.exit_head import ExitHeads, NormBuilder, build_norm
from megatron.early_exit.model.held_rows import HeldRows, hold_rows, unpack
from megatron.early_exit.model.look_ahead import LookAheadTap, finish_frozen

TUNING_ANCHOR = "tuning_anchor"
"""Name of a parameter without meaning that models have whose exits are tuned."""

_ANCHOR_SIZE = 4096
_TUNED = ("exits", "mtp")
"""The modules that are trained and saved where the backbone is frozen."""

_BRANCH_KWARGS = (
    *("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"),
    *("rotary_pos_cos_sin", "attention_bias", "packed_seq_params"),
    *("sequence_len_offset", "padding_mask"),
)


class ExitTap(Protocol):
    """A function that is called at an exit while the backbone runs; training provides one."""

    def __call__(
        self,
        exits: ExitHeads,
        position: int,
        hidden: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        final_tokens: Tensor | None,
        layer_kwargs: dict[str, Any],
        asked: Tensor | None,
        asked_at_end: Tensor | None,
    ) -> Tensor:
        """Return `hidden` [s, b, h] unchanged in value; the others are [b, s]. `final_tokens` are
        there if exits have gates and the chunk the final head, and hold nothing before
        `keep_final_tokens` has been called. Tokens that are not `asked` have left before, and those
        that are not `asked_at_end` before the final head; None is that all are."""

    def keep_final_tokens(self, exits: ExitHeads, logits: Tensor, final_tokens: Tensor) -> None:
        """Called at the end of a forward pass of the chunk with the final head, if exits of any
        chunk have gates: write the final head's most probable tokens into `final_tokens` [b, s];
        logits are [s, b, v], of this rank's part of the vocabulary."""


class EarlyExitGPTModel(GPTModel):
    """GPTModel whose layers pass their hidden states to `exit_tap` at the exits."""

    exits: ExitHeads
    exit_tap: ExitTap | None
    look_ahead_tap: LookAheadTap | None
    tunes_exits: bool
    """Whether only the exits, and the look-ahead head if there is one, are trained and saved."""

    def hold_rows(self) -> None:
        """Prepare the layers of this chunk for tokens that they hand on unchanged, `held` of
        `forward`; before exits are added, which are to see what is handed on.

        Raises:
            ValueError: the chunk has no layers, so that nothing would number its microbatches.
        """
        layers: list[Any] = list(self.decoder.layers)
        if not layers:
            raise ValueError(
                "--layer-dropout and --exit-propagate-prob need layers on each pipeline stage, and "
                "one has none"
            )
        hold_rows(layers, self.config.num_layers, self.pg_collection.tp)

    def add_exits(self, options: EarlyExitConfig) -> None:
        """Build the heads of the exits that belong to this chunk and attach them to its layers.

        Raises:
            ValueError: a layer with an exit has cross attention.
        """
        self.exit_tap = self.look_ahead_tap = None
        self.tunes_exits = False
        self._final_tokens: Tensor | None = None
        self._heads_before_final = 0
        self.exits = ExitHeads(self.config, self.vocab_size, self.pg_collection)
        backbone: list[Any] = list(self.decoder.layers)
        layers: dict[int, TransformerLayer] = {one.layer_number: one for one in backbone}
        norm = self.decoder.submodules.layer_norm
        assert norm is not None
        for position in options.positions:
            layer = layers.get(position + 1 if options.pre_exit else position)
            if layer is None:
                continue
            if not isinstance(layer.cross_attention, IdentityOp):
                raise ValueError("exits need layers without cross attention")
            self.exits.add(options, position, layer, norm)
            self._attach(options, position, layer)
        if self.exits.heads:
            self._share_matrix(options)
        if self.exits.heads and options.share_final_head:
            self._share_final_norm(norm)
        self._set_precision_of_exits()
        self._compares_tokens = bool(options.beside_parts and self.post_process)
        if self._compares_tokens:
            self.output_layer.register_forward_hook(self._keep_final_tokens)

    def tune_exits(self, freeze_projections: bool) -> None:
        """Freeze everything except the exits' own weights and the look-ahead head's; with
        `freeze_projections` also the exits' output projections."""
        self.tunes_exits = True
        self.requires_grad_(False)
        # Megatron's optimizers and checkpoints want something of every pipeline stage, also of one
        # that has no exits, and the distributed optimizer something for each data-parallel rank. It
        # never gets a gradient and stays zero.
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        zero = torch.zeros(_ANCHOR_SIZE, dtype=self.config.params_dtype, device=device)
        self.tuning_anchor = Parameter(zero)
        for head in self.exits.heads.values():
            head.requires_grad_()
            if freeze_projections:
                head.projection.requires_grad_(False)
        if self.mtp_process:
            self.mtp.requires_grad_()

    @property
    def needs_inputs(self) -> bool:
        """Whether this chunk needs tokens and their positions: at its beginning, or to predict more
        than one token at its end."""
        return bool(self.pre_process or self.mtp_process)

    @property
    def needs_targets(self) -> bool:
        """Whether this chunk needs labels and loss mask: if it has exits, or is the last one of the
        pipeline, where Megatron counts the tokens, even for a model without a final head."""
        ends = is_pp_last_stage(self.pg_collection.pp) if self.tunes_exits else self.post_process
        return ends or self._passes_targets

    @property
    def _passes_targets(self) -> bool:
        """Whether labels and loss mask go through the layers of this chunk."""
        return bool(self.exits.heads) or (self.tunes_exits and self.mtp_process)

    def train(self, mode: bool = True) -> "EarlyExitGPTModel":
        """As `torch.nn.Module.train`, but a frozen backbone always stays in evaluation mode."""
        super().train(mode)
        if self.tunes_exits:
            for name, module in self.named_children():
                if name not in _TUNED:
                    module.eval()
        return self

    def _set_precision_of_exits(self) -> None:
        """Apply `--te-precision-config-file` to the heads, as GPTModel did to the backbone, which
        was all there was when it was built."""
        for name, module in self.exits.named_modules(prefix="exits"):
            if hasattr(module, "finish_init"):
                module.finish_init(get_quant_config_or_none(name, self.config.quant_recipe))

    def _share_matrix(self, options: EarlyExitConfig) -> None:
        """Let exits without projections of their own project with the chunk's word embedding or
        output layer, or with a copy."""
        parts = self.exits.backbone
        if options.untie_exit_output_weights:
            return
        if options.share_final_head and not self.share_embeddings_and_output_weights:
            if self.post_process:
                parts.project_with(lambda: self.output_layer.weight)
            else:
                parts.copy_matrix(OUTPUT_LAYER)
        elif self.needs_inputs:
            parts.project_with(lambda: self.embedding.word_embeddings.weight)
        elif self.post_process and self.share_embeddings_and_output_weights:
            parts.project_with(lambda: self.output_layer.weight)
        else:
            parts.copy_matrix(WORD_EMBEDDING)

    def _share_final_norm(self, norm: NormBuilder) -> None:
        """Let exits end with the chunk's final norm, or with a copy."""
        if self.post_process:
            # Megatron's annotation is of a protocol that modules fulfil.
            self.exits.backbone.normalize_with(lambda: cast(Module, self.decoder.final_layernorm))
        else:
            self.exits.backbone.copy_norm(build_norm(norm, self.config))

    def _attach(self, options: EarlyExitConfig, position: int, layer: TransformerLayer) -> None:
        def tap(hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
            labels = kwargs.get("context")
            if self.exit_tap is None or labels is None:
                return hidden
            branch_kwargs = {name: kwargs.get(name) for name in _BRANCH_KWARGS}
            mask, held = unpack(kwargs.get("context_mask"), self.config.num_layers)
            asked = asked_at_end = None
            if held is not None:
                asked, asked_at_end = held.asked_at(position), held.asked_at(held.num_layers)
            final_tokens = None
            if self._compares_tokens:
                labels, final_tokens = labels
            return self.exit_tap(
                self.exits,
                position,
                hidden,
                labels,
                mask,
                final_tokens,
                branch_kwargs,
                asked,
                asked_at_end,
            )

        if options.replaces_mlp:
            _tap_before_mlp(layer, tap)
        elif options.pre_exit:
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: (
                    args,
                    {**kwargs, "hidden_states": tap(kwargs["hidden_states"], kwargs)},
                ),
                with_kwargs=True,
            )
        else:
            layer.register_forward_hook(
                lambda _, args, kwargs, output: (tap(output[0], kwargs), *output[1:]),
                with_kwargs=True,
            )

    def _keep_final_tokens(self, _: Module, args: object, output: tuple[Tensor, Any]) -> None:
        if self._heads_before_final:
            self._heads_before_final -= 1
        elif self.exit_tap is not None and self._final_tokens is not None:
            tokens, self._final_tokens = self._final_tokens, None
            self.exit_tap.keep_final_tokens(self.exits, output[0], tokens)

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        held: HeldRows | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """GPTModel's forward; `labels` and `loss_mask` [b, s] are used on every stage with exits,
        `held` on every stage: tokens that layers hand on, see `hold_rows`.

        Returns:
            What GPTModel returns: hidden states [s, b, h] before the last stage; on it, logits [b,
            s, v] without labels, losses of the final head [b, s] with them. If exits are tuned,
            only they use the labels: the result is logits, or hidden states without a final head.
        """
        targets = {}
        if labels is not None and self._compares_tokens:
            # Passed on with the labels: what recomputes activations would not know of which
            # microbatch it is.
            both = torch.stack((labels, torch.full_like(labels, -1)))
            self._final_tokens = both[1]
        if labels is not None and self._passes_targets:
            context = both if self._compares_tokens else labels
            targets = {"context": context, "context_mask": loss_mask}
        if held is not None:
            targets["context_mask"] = held.pack(loss_mask)
        if targets:
            extra_block_kwargs = {**(extra_block_kwargs or {}), **targets}
        if self.tunes_exits:
            labels = loss_mask = None
        kwargs |= {
            "labels": labels,
            "loss_mask": loss_mask,
            "extra_block_kwargs": extra_block_kwargs,
        }
        return super().forward(*args, **kwargs)

    def _postprocess(self, **end: Any) -> Tensor:  # type: ignore[override]
        """GPTModel's end of a forward pass. Where the backbone is frozen, what looks ahead is not
        trained within the pass: a tap is told of it."""
        if self.tunes_exits and self.mtp_process:
            targets = end["extra_block_kwargs"] or {}
            labels, loss_mask = targets.get("context"), targets.get("context_mask")
            if labels is not None and self._compares_tokens:
                labels = labels[0]
            return finish_frozen(self, labels, loss_mask, end)
        if self.mtp_process and self._compares_tokens:
            # Megatron projects what looks ahead first.
            self._heads_before_final = self.config.mtp_num_layers or 0
        result: Tensor = super()._postprocess(**end)  # type: ignore[no-untyped-call]
        return result

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """GPTModel's sharded state and that of `exits.*`, or only that and the look-ahead head's if
        exits are tuned. Copies of parts of the backbone are saved as further replicas of them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.exits.heads:
            # Each layer is in one chunk: its number, from 1, tells the copies apart.
            first_layer: Any = self.decoder.layers[0]
            self.exits.backbone.replicate(state, prefix, 1 + first_layer.layer_number, metadata)
        if not self.tunes_exits:
            return state
        anchor = state[f"{prefix}{TUNING_ANCHOR}"]
        stage = torch.distributed.get_rank(self.pg_collection.pp)
        anchor.replica_id = (stage, *anchor.replica_id[1:])
        kept = tuple(f"{prefix}{name}" for name in (*(f"{one}." for one in _TUNED), TUNING_ANCHOR))
        return {name: entry for name, entry in state.items() if entry.key.startswith(kept)}


def _tap_before_mlp(
    layer: TransformerLayer, tap: Callable[[Tensor, dict[str, Any]], Tensor]
) -> None:
    # The (absent) cross attention stands between attention and MLP: its input is the residual
    # stream there, and unlike the norm before the MLP it is never recomputed by itself.
    current: dict[str, Any] = {}
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: current.update(kwargs), with_kwargs=True
    )

    def at_cross_attention(_: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kwargs = dict(current)
        current.clear()
        return tap(output, kwargs)

    layer.cross_attention.register_forward_hook(at_cross_attention)
