"""Flags of Megatron that act only beside another one, and are refused without it.

Megatron takes them without a word, as it takes `--num-query-groups` without
`--group-query-attention`, and trains another model than the one that was asked for.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from megatron.early_exit.training.given_flags import given_option, has_default

_ROTARY = ("rope", "mrope", "yarn")


@dataclass(frozen=True, kw_only=True)
class Dependent:
    """Flags that do nothing without something else, by their names in Megatron's arguments.

    Attributes:
        needs: what that is.
        met: whether these arguments have it.
        names: the flags one by one.
        families: what the names of all such flags begin with.
        but: names of a family that do not need it.
    """

    needs: str
    met: Callable[[Namespace], bool]
    names: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def covers(self, name: str) -> bool:
        """Whether the flag `name` is one of them."""
        return name in self.names or (name.startswith(self.families) and name not in self.but)


def _given(*names: str) -> Callable[[Namespace], bool]:
    """Any of the arguments has a value that is not None, false, zero or empty."""
    return lambda args: any(getattr(args, name) for name in names)


def _is(name: str, *values: object) -> Callable[[Namespace], bool]:
    return lambda args: getattr(args, name) in values


def _is_rotary(args: Namespace) -> bool:
    return (
        args.position_embedding_type in _ROTARY
        or args.use_rotary_position_embeddings
        or args.multi_latent_attention
    )


DEPENDENT = (
    # The model.
    Dependent(
        needs="--group-query-attention",
        met=_given("group_query_attention"),
        names=("num_query_groups",),
    ),
    Dependent(
        needs="--position-embedding-type rope",
        met=_is_rotary,
        families=("rotary_", "rope_"),
        but=("rotary_scaling_factor",),
        names=("use_rope_scaling", "no_rope_freq"),
    ),
    Dependent(
        needs="--use-rope-scaling", met=_given("use_rope_scaling"), names=("rope_scaling_factor",)
    ),
    Dependent(
        needs="--position-embedding-type yarn or --multi-latent-attention",
        met=lambda args: args.position_embedding_type == "yarn" or args.multi_latent_attention,
        families=("mscale",),
        names=("rotary_scaling_factor",),
    ),
    Dependent(
        needs="--position-embedding-type yarn on plain attention (--multi-latent-attention has "
        "no flags for it)",
        met=lambda args: args.position_embedding_type == "yarn" and not args.multi_latent_attention,
        families=("yarn_",),
    ),
    Dependent(
        needs="--position-embedding-type mrope",
        met=_is("position_embedding_type", "mrope"),
        names=("mrope_section",),
    ),
    Dependent(
        needs="--multi-latent-attention",
        met=_given("multi_latent_attention"),
        names=(
            *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
            "mla_down_proj_fusion",
        ),
    ),
    Dependent(
        needs="--experimental-attention-variant dsa",
        met=_is("experimental_attention_variant", "dsa"),
        families=("dsa_",),
    ),
    Dependent(
        needs="--experimental-attention-variant",
        met=_given("experimental_attention_variant"),
        families=("linear_",),
    ),
    Dependent(needs="--window-size", met=_given("window_size"), names=("window_attn_skip_freq",)),
    Dependent(needs="--qk-clip", met=_given("qk_clip"), families=("qk_clip_",)),
    Dependent(
        needs="--num-experts",
        met=_given("num_experts"),
        families=("moe_",),
        names=(
            *("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
            *("ep_overlap_early_attn_memory_release", "high_priority_a2a_comm_stream"),
            *("use_grouped_gemm_for_shared_expert", "use_fused_weighted_squared_relu"),
            *("save_tokens_per_expert_interval", "expert_tensor_parallel_num_weight_shards"),
        ),
    ),
    Dependent(
        needs="--num-experts",
        # Scripts for dense models give what it would be anyway.
        met=lambda args: (
            args.num_experts
            or args.expert_tensor_parallel_size in (1, args.tensor_model_parallel_size)
        ),
        names=("expert_tensor_parallel_size",),
    ),
    Dependent(
        needs="--mtp-num-layers",
        met=_given("mtp_num_layers"),
        families=("mtp_",),
        but=("mtp_num_layers",),
    ),
    Dependent(needs="--use-mup", met=_given("use_mup"), families=("mup_",)),
    Dependent(
        needs="--heterogeneous-layers-config-path",
        met=_given("heterogeneous_layers_config_path"),
        names=("heterogeneous_layers_config_encoded_json",),
    ),
    # Memory and precision.
    Dependent(
        needs="--recompute-granularity full",
        met=_is("recompute_granularity", "full"),
        names=("recompute_method", "recompute_num_layers"),
    ),
    Dependent(
        needs="--recompute-granularity selective or --recompute-activations",
        met=lambda args: (
            args.recompute_granularity == "selective"
            or args.recompute_activations
            or args.moe_layer_recompute
        ),
        names=("recompute_modules",),
    ),
    Dependent(
        needs="--fp16",
        met=_given("fp16"),
        names=("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    ),
    Dependent(
        needs="--fp16, --bf16 or --use-distributed-optimizer",
        # 0 is Megatron's own choice.
        met=lambda args: (
            not args.loss_scale or args.fp16 or args.bf16 or args.use_distributed_optimizer
        ),
        names=("loss_scale",),
    ),
    Dependent(
        needs="--fp8-format or --fp4-format",
        met=_given("fp8", "fp4"),
        families=("num_layers_at_",),
        names=("first_last_layers_bf16", "reuse_grad_buf_for_mxfp8_param_ag"),
    ),
    Dependent(
        needs="--fp8-format",
        met=_given("fp8"),
        families=("fp8_",),
        names=("keep_fp8_transpose_cache",),
    ),
    Dependent(needs="--fp4-format", met=_given("fp4"), families=("fp4_",)),
    Dependent(
        needs="--cpu-offloading-num-layers",
        met=_given("cpu_offloading_num_layers"),
        names=("cpu_offloading_retain_pinned_cpu_buffers",),
    ),
    Dependent(
        needs="--fine-grained-activation-offloading",
        met=_given("fine_grained_activation_offloading"),
        families=("fine_grained_offloading_",),
        names=(
            *("offload_modules", "min_offloaded_tensor_size", "delay_offload_until_cuda_graph"),
            *("delta_offload_bytes_across_pp_ranks", "activation_offload_fraction"),
        ),
    ),
    Dependent(
        needs="--cross-entropy-loss-fusion",
        met=_given("cross_entropy_loss_fusion"),
        names=("cross_entropy_fusion_impl",),
    ),
    # The optimizer.
    Dependent(
        needs="--optimizer muon, dist_muon or adaptive_muon",
        met=_is("optimizer", "muon", "dist_muon", "adaptive_muon"),
        families=("muon_",),
    ),
    Dependent(
        needs="--optimizer lion, or --muon-scalar-optimizer lion",
        met=lambda args: "lion" in (args.optimizer, args.muon_scalar_optimizer),
        families=("lion_",),
    ),
    Dependent(needs="--optimizer sgd", met=_is("optimizer", "sgd"), names=("sgd_momentum",)),
    Dependent(
        needs="an --optimizer other than sgd",
        met=lambda args: args.optimizer != "sgd",
        families=("adam_",),
    ),
    Dependent(
        needs="--optimizer-cpu-offload",
        met=_given("optimizer_cpu_offload"),
        families=("pin_cpu_",),
        names=(
            *("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
            "overlap_cpu_optimizer_d2h_h2d",
        ),
    ),
    Dependent(
        needs="--lr-decay-style WSD", met=_is("lr_decay_style", "WSD"), families=("lr_wsd_",)
    ),
    Dependent(needs="--decoupled-lr", met=_given("decoupled_lr"), names=("decoupled_min_lr",)),
    # Parallelism.
    Dependent(
        needs="--tp-comm-overlap",
        met=_given("tp_comm_overlap"),
        families=("tp_comm_",),
        but=("tp_comm_overlap",),
    ),
    Dependent(
        needs="virtual stages (--num-layers-per-virtual-pipeline-stage, "
        "--num-virtual-stages-per-pipeline-rank or --pipeline-model-parallel-layout)",
        met=_given(
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        ),
        names=("microbatch_group_size_per_vp_stage", "overlap_p2p_comm_warmup_flush"),
    ),
    Dependent(
        needs="--use-megatron-fsdp",
        met=_given("use_megatron_fsdp"),
        families=("megatron_fsdp_", "fsdp_", "outer_dp_", "data_parallel_sharding_"),
        names=(
            *("gradient_reduce_div_fusion", "suggested_communication_unit_size"),
            "strict_fsdp_dtensor_load",
        ),
    ),
    Dependent(needs="--use-torch-fsdp2", met=_given("use_torch_fsdp2"), families=("torch_fsdp2_",)),
    Dependent(
        needs="--context-parallel-size 2 or more",
        met=lambda args: args.context_parallel_size > 1,
        names=("cp_comm_type",),
    ),
    # Checkpoints.
    Dependent(
        needs="--save: nothing would be saved",
        met=_given("save"),
        names=(
            *("save_interval", "save_retain_interval", "non_persistent_save_interval"),
            *("save_params_interval", "save_activations_interval", "save_wgrads_interval"),
            *("save_dgrads_interval", "async_save", "log_progress"),
        ),
    ),
    Dependent(
        needs="--save or --ckpt-convert-format: nothing would be saved",
        met=_given("save", "ckpt_convert_format"),
        names=("no_save_optim", "no_save_rng"),
    ),
    Dependent(
        needs="--load or --pretrained-checkpoint: nothing would be loaded",
        met=_given("load", "pretrained_checkpoint"),
        names=(
            *(
                "ckpt_step",
                "no_load_optim",
                "no_load_rng",
                "finetune",
                "exit_on_missing_checkpoint",
            ),
            *("load_main_params_from_ckpt", "override_ckpt_iteration", "ckpt_fully_parallel_load"),
        ),
    ),
    Dependent(
        needs="--use-checkpoint-args",
        met=_given("use_checkpoint_args"),
        names=(*("use_mp_args_from_checkpoint_args", "use_tokenizer_model_from_checkpoint_args"),),
    ),
    Dependent(
        needs="--async-save",
        met=_given("async_save"),
        families=("async_",),
        but=("async_save",),
        names=("use_persistent_ckpt_worker",),
    ),
    Dependent(
        needs="--non-persistent-save-interval or --load",
        met=_given("non_persistent_save_interval", "load"),
        families=("non_persistent_",),
        but=("non_persistent_save_interval",),
    ),
    Dependent(needs="--replication", met=_given("replication"), families=("replication_",)),
    Dependent(
        needs="--ckpt-convert-format",
        met=_given("ckpt_convert_format"),
        names=("ckpt_convert_save",),
    ),
    # Logs.
    Dependent(
        needs="--tensorboard-dir",
        met=_given("tensorboard_dir"),
        families=("tensorboard_",),
        but=("tensorboard_dir",),
        names=(
            *("log_loss_scale_to_tensorboard", "log_validation_ppl_to_tensorboard"),
            *("log_memory_to_tensorboard", "log_world_size_to_tensorboard"),
        ),
    ),
    Dependent(
        needs="--tensorboard-dir or --wandb-project",
        met=_given("tensorboard_dir", "wandb_project"),
        names=("log_timers_to_tensorboard",),
    ),
    Dependent(
        needs="--wandb-project",
        met=_given("wandb_project"),
        families=("wandb_",),
        but=("wandb_project",),
    ),
    Dependent(
        needs="--profile",
        met=_given("profile"),
        families=("profile_step_", "pytorch_profiler_"),
        names=("use_pytorch_profiler", "nvtx_ranges", "record_shapes"),
    ),
    Dependent(
        needs="--profile or --record-memory-history",
        met=_given("profile", "record_memory_history"),
        names=("profile_ranks",),
    ),
    Dependent(
        needs="--record-memory-history",
        met=_given("record_memory_history"),
        names=("memory_snapshot_path",),
    ),
    Dependent(
        needs="--logits-save-dir",
        met=_given("logits_save_dir"),
        families=("logits_save_",),
        but=("logits_save_dir",),
    ),
    Dependent(
        needs="--log-straggler",
        met=_given("log_straggler"),
        families=("straggler_",),
        names=("disable_straggler_on_startup",),
    ),
    Dependent(
        needs="--enable-ft-package",
        met=_given("enable_ft_package"),
        names=("calc_ft_timeouts", "ft_num_warmup_iters"),
    ),
    Dependent(
        needs="--fault-injector-ranks or --fault-injector-num-ranks",
        met=_given("fault_injector_ranks", "fault_injector_num_ranks"),
        families=("fault_injector_",),
        but=("fault_injector_ranks", "fault_injector_num_ranks"),
    ),
    Dependent(
        needs="--error-injection-rate",
        met=_given("error_injection_rate"),
        names=("error_injection_type",),
    ),
    Dependent(
        needs="--manual-gc",
        met=_given("manual_gc"),
        names=("manual_gc_interval", "manual_gc_eval"),
    ),
    # What the machine or its layers must have.
    Dependent(
        needs="--transformer-impl transformer_engine",
        met=lambda args: args.transformer_impl != "local",
        names=(
            *("fused_residual_rmsnorm", "use_te_activation_func", "flash_attention_version"),
            *("use_transformer_engine_op_fuser", "te_precision_config_file"),
            *("cpu_offloading_num_layers", "experimental_attention_variant"),
            *("heterogeneous_layers_config_path", "batch_invariant_mode"),
        ),
    ),
    Dependent(
        needs="--distributed-backend nccl",
        met=_is("distributed_backend", "nccl"),
        families=("flight_recorder_", "sharp_"),
        names=(
            *("nccl_communicator_config_path", "use_sharp", "high_priority_stream_groups"),
            *("disable_symmetric_registration", "ddp_pad_buckets_for_high_nccl_busbw"),
            "create_all_gather_group",
        ),
    ),
    Dependent(
        needs="a GPU, which this machine lacks",
        met=lambda args: torch.cuda.is_available(),
        names=(
            *("empty_unused_memory_level", "log_device_memory_used", "gpu_sniff_test_interval"),
            *("log_energy", "disable_bf16_reduced_precision_matmul"),
        ),
    ),
    Dependent(
        needs="--cuda-graph-impl local or transformer_engine",
        met=lambda args: (
            args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
        ),
        families=("cuda_graph_",),
        but=("cuda_graph_impl",),
    ),
)


def check_dependent(parser: ArgumentParser, args: Namespace, given: Collection[str]) -> None:
    """Refuse flags that would change nothing for want of another one.

    Args:
        parser: of the command line.
        args: what it has parsed, with what a checkpoint has restored.
        given: names of the arguments that are on the command line; those with their default value
            are taken.

    Raises:
        ValueError: naming the flag, its value and what it needs.
    """
    for name in sorted(given):
        if has_default(parser, args, name):
            continue
        for one in DEPENDENT:
            if one.covers(name) and not one.met(args):
                flag = given_option(parser, name, getattr(args, name))
                raise ValueError(f"{flag} has no effect without {one.needs}")
