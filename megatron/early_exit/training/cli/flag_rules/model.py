"""Flags of the model that do nothing without another one."""

from argparse import Namespace

from megatron.early_exit.training.cli.flag_rules.rule import any_given, dependent, is_one_of

_ROTARY = ("rope", "mrope", "yarn")


def _is_rotary(args: Namespace) -> bool:
    return (
        args.position_embedding_type in _ROTARY
        or args.use_rotary_position_embeddings
        or args.multi_latent_attention
    )


MODEL = (
    dependent(
        needs="--group-query-attention",
        met=any_given("group_query_attention"),
        names=("num_query_groups",),
    ),
    dependent(
        needs="rotary embeddings (--position-embedding-type rope, yarn or mrope, or "
        "--multi-latent-attention)",
        met=_is_rotary,
        families=("rotary_", "rope_"),
        but=("rotary_scaling_factor",),
        names=("no_rope_freq",),
    ),
    dependent(
        needs="--position-embedding-type rope on plain attention (yarn, mrope and "
        "--multi-latent-attention are not scaled)",
        met=lambda args: (
            (args.position_embedding_type == "rope" or args.use_rotary_position_embeddings)
            and not args.multi_latent_attention
        ),
        names=("use_rope_scaling",),
    ),
    dependent(
        needs="--use-rope-scaling",
        met=any_given("use_rope_scaling"),
        names=("rope_scaling_factor",),
    ),
    dependent(
        needs="--position-embedding-type yarn or --multi-latent-attention",
        met=lambda args: args.position_embedding_type == "yarn" or args.multi_latent_attention,
        families=("mscale",),
        names=("rotary_scaling_factor",),
    ),
    dependent(
        needs="--position-embedding-type yarn on plain attention (--multi-latent-attention has "
        "no flags for it)",
        met=lambda args: args.position_embedding_type == "yarn" and not args.multi_latent_attention,
        families=("yarn_",),
    ),
    dependent(
        needs="--position-embedding-type mrope",
        met=is_one_of("position_embedding_type", "mrope"),
        names=("mrope_section",),
    ),
    dependent(
        needs="--multi-latent-attention",
        met=any_given("multi_latent_attention"),
        names=(
            *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
            "mla_down_proj_fusion",
        ),
    ),
    dependent(
        needs="--experimental-attention-variant dsa",
        met=is_one_of("experimental_attention_variant", "dsa"),
        families=("dsa_",),
    ),
    dependent(
        needs="--experimental-attention-variant",
        met=any_given("experimental_attention_variant"),
        families=("linear_",),
    ),
    dependent(
        needs="--window-size", met=any_given("window_size"), names=("window_attn_skip_freq",)
    ),
    dependent(needs="--qk-clip", met=any_given("qk_clip"), families=("qk_clip_",)),
    dependent(
        needs="--num-experts",
        met=any_given("num_experts"),
        families=("moe_",),
        names=(
            *("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
            *("ep_overlap_early_attn_memory_release", "high_priority_a2a_comm_stream"),
            *("use_grouped_gemm_for_shared_expert", "use_fused_weighted_squared_relu"),
            *("save_tokens_per_expert_interval", "expert_tensor_parallel_num_weight_shards"),
        ),
    ),
    dependent(
        needs="--num-experts",
        # Scripts for dense models give what it would be anyway.
        met=lambda args: (
            args.num_experts
            or args.expert_tensor_parallel_size in (1, args.tensor_model_parallel_size)
        ),
        names=("expert_tensor_parallel_size",),
    ),
    dependent(
        needs="--mtp-num-layers",
        met=any_given("mtp_num_layers"),
        families=("mtp_",),
        but=("mtp_num_layers",),
    ),
    dependent(needs="--use-mup", met=any_given("use_mup"), families=("mup_",)),
    dependent(
        needs="--heterogeneous-layers-config-path",
        met=any_given("heterogeneous_layers_config_path"),
        names=("heterogeneous_layers_config_encoded_json",),
    ),
)
