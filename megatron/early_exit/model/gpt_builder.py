"""Megatron's configuration of a GPT with the exits added, and the builder of the model."""

from dataclasses import dataclass, field
from typing import ClassVar, cast

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import as_flag
from megatron.early_exit.model.attention import check_attention
from megatron.early_exit.model.gpt_model import EarlyExitGPTModel
from megatron.early_exit.model.layer_specs import mtp_spec_function
from megatron.early_exit.model.tied_weights import connect_tied_weights
from megatron.early_exit.patches.mtp_block_spec import mtp_specs_by


@dataclass(kw_only=True)
class EarlyExitGPTModelConfig(GPTModelConfig):
    """Megatron's GPT configuration plus the exits."""

    builder: ClassVar[str] = "megatron.early_exit.model.gpt_builder.EarlyExitGPTModelBuilder"
    early_exit: EarlyExitConfig = field(default_factory=EarlyExitConfig)
    tunes_exits: bool = False
    """Whether only the exits, and the look-ahead head if there is one, are trained and saved."""
    freezes_projections: bool = False
    """Whether the exits' output projections are frozen, too."""
    has_final_head: bool = True
    """Whether the last stage ends with the final norm and the output layer."""
    holds_rows: bool = False
    """Whether layers can hand on tokens unchanged, see `held_rows`."""

    def __post_init__(self) -> None:
        if connect_tied_weights not in self.pre_wrap_hooks:
            self.pre_wrap_hooks = [*self.pre_wrap_hooks, connect_tied_weights]


class EarlyExitGPTModelBuilder(GPTModelBuilder):
    """Builds `EarlyExitGPTModel` stages.

    Raises:
        ValueError: a feature of the backbone cannot be combined with exits.
    """

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> EarlyExitGPTModel:
        """Build one stage; arguments as in `GPTModelBuilder.build_model`."""
        config = cast(EarlyExitGPTModelConfig, self._model_config)
        check_backbone(config)
        if not config.has_final_head:
            post_process = False
        with mtp_specs_by(mtp_spec_function):
            model: MegatronModule = super().build_model(
                pg_collection, pre_process, post_process, vp_stage
            )
        # The stock builder names its class, and exits are added after construction, so the class
        # can change here; overriding it would mean copying its list of arguments.
        model.__class__ = EarlyExitGPTModel
        model = cast(EarlyExitGPTModel, model)
        is_tied = config.share_embeddings_and_output_weights
        if model.mtp_process and model.post_process and not model.pre_process and is_tied:
            # Megatron allocates it, although it projects with the embedding there, and would then
            # fail to save it.
            model.output_layer.register_parameter("weight", None)
        if config.holds_rows:
            model.hold_rows()
        model.add_exits(config.early_exit)
        if config.tunes_exits:
            model.tune_exits(config.freezes_projections)
        return model


def check_backbone(config: EarlyExitGPTModelConfig) -> None:
    """Refuse features that local layers or exits cannot be combined with.

    Raises:
        ValueError: a feature is refused; the message names its flag.
    """
    transformer, exits = config.transformer, config.early_exit
    exits.validate(transformer.num_layers)
    if transformer.transformer_impl == "local":
        check_attention(transformer)
    if not exits.positions:
        return
    if transformer.mtp_num_layers and transformer.mtp_standalone:
        raise ValueError(
            f"--mtp-num-layers {transformer.mtp_num_layers} on a stage of its own, by "
            "--pipeline-model-parallel-layout, cannot be combined with --exit-layer-nums, allowed: "
            "behind the last layer of the decoder"
        )
    if transformer.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl {transformer.cuda_graph_impl} cannot be combined with "
            "--exit-layer-nums, allowed: none"
        )
    if transformer.overlap_moe_expert_parallel_comm:
        raise ValueError(
            "--overlap-moe-expert-parallel-comm cannot be combined with --exit-layer-nums: it "
            "takes the layers apart, and an exit needs whole ones"
        )
    if transformer.experimental_attention_variant == "dsa":
        raise ValueError(
            "--experimental-attention-variant dsa cannot be combined with --exit-layer-nums: "
            "Megatron has one place for the scale of an auxiliary loss, and both need it"
        )
    if exits.share_final_head and transformer.use_mup:
        raise ValueError(
            "--use-mup cannot be combined with --share-final-head: it scales the logits of the "
            "model's own head, and exits do not"
        )
    if exits.use_exit_block and transformer.fine_grained_activation_offloading:
        raise ValueError(
            "--fine-grained-activation-offloading cannot be combined with --use-exit-block: "
            "it counts the layers that run in the forward pass"
        )
    if transformer.fine_grained_activation_offloading:
        _check_offloading(transformer.offload_modules or [], exits)
    if transformer.fp8_output_proj:
        raise ValueError(
            "--fp8-output-proj cannot be combined with --exit-layer-nums: the exits' projections "
            "are not computed in FP8"
        )
    for part in exits.branch_parts:
        if part.has_mlp and transformer.num_moe_experts is not None:
            raise ValueError(
                f"{as_flag(part.field)} cannot be combined with --num-experts "
                f"{transformer.num_moe_experts}: the heads of a mixture-of-experts model are made "
                "of a norm and a projection"
            )


def _check_offloading(modules: list[str], exits: EarlyExitConfig) -> None:
    """Refuse to offload an exit's input: after the copy Megatron frees it, although the exit's
    backward still needs it."""
    freed, flag = "attn_norm", "--exit-layer-nums"
    for part in exits.head_parts:
        if part.replaces_mlp:
            freed, flag = "mlp_norm", as_flag(part.field)
    if freed in modules:
        raise ValueError(
            f"--offload-modules {freed} cannot be combined with {flag}: it frees the input of "
            "exits before their backward, allowed: the other modules"
        )
