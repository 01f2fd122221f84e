"""Flags of Megatron that act only beside another one, and are refused without it.

Megatron takes them without a word, as it takes `--num-query-groups` without
`--group-query-attention`, and trains another model than the one that was asked for.
"""

from argparse import Namespace

import torch

from megatron.early_exit.training.cli.flag_rules.rule import (
    any_given,
    dependent,
    dependent_on,
    is_one_of,
)


def _is_rotary(args: Namespace) -> bool:
    return (
        args.position_embedding_type in ("rope", "mrope", "yarn")
        or args.use_rotary_position_embeddings
        or args.multi_latent_attention
    )


DEPENDENT = (
    # The model.
    dependent_on("group_query_attention", names=("num_query_groups",)),
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
    dependent_on("use_rope_scaling", names=("rope_scaling_factor",)),
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
    dependent_on(
        "multi_latent_attention",
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
    dependent_on("experimental_attention_variant", families=("linear_",)),
    dependent_on("window_size", names=("window_attn_skip_freq",)),
    dependent_on("qk_clip", families=("qk_clip_",)),
    dependent_on(
        "num_experts",
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
    dependent_on("mtp_num_layers", families=("mtp_",)),
    dependent_on("use_mup", families=("mup_",)),
    dependent_on(
        "heterogeneous_layers_config_path", names=("heterogeneous_layers_config_encoded_json",)
    ),
    # Memory and precision.
    dependent(
        needs="--recompute-granularity full",
        met=is_one_of("recompute_granularity", "full"),
        names=("recompute_method", "recompute_num_layers"),
    ),
    dependent(
        needs="--recompute-granularity selective or --recompute-activations",
        met=lambda args: (
            args.recompute_granularity == "selective"
            or args.recompute_activations
            or args.moe_layer_recompute
        ),
        names=("recompute_modules",),
    ),
    dependent_on(
        "fp16", names=("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    ),
    dependent(
        needs="--fp16, --bf16 or --use-distributed-optimizer",
        # 0 is Megatron's own choice.
        met=lambda args: (
            not args.loss_scale or args.fp16 or args.bf16 or args.use_distributed_optimizer
        ),
        names=("loss_scale",),
    ),
    dependent(
        needs="--fp8-format or --fp4-format",
        met=any_given("fp8", "fp4"),
        names=("first_last_layers_bf16", "reuse_grad_buf_for_mxfp8_param_ag"),
    ),
    dependent_on("first_last_layers_bf16", families=("num_layers_at_",)),
    dependent(
        needs="--fp8-format",
        met=any_given("fp8"),
        families=("fp8_",),
        names=("keep_fp8_transpose_cache",),
    ),
    dependent(needs="--fp4-format", met=any_given("fp4"), families=("fp4_",)),
    dependent_on("cpu_offloading_num_layers", names=("cpu_offloading_retain_pinned_cpu_buffers",)),
    dependent_on(
        "fine_grained_activation_offloading",
        families=("fine_grained_offloading_",),
        names=(
            *("offload_modules", "min_offloaded_tensor_size", "delay_offload_until_cuda_graph"),
            *("delta_offload_bytes_across_pp_ranks", "activation_offload_fraction"),
        ),
    ),
    dependent_on("cross_entropy_loss_fusion", names=("cross_entropy_fusion_impl",)),
    # The optimizer.
    dependent(
        needs="--optimizer muon, dist_muon or adaptive_muon",
        met=is_one_of("optimizer", "muon", "dist_muon", "adaptive_muon"),
        families=("muon_",),
    ),
    dependent(
        needs="--optimizer lion, or --muon-scalar-optimizer lion",
        met=lambda args: "lion" in (args.optimizer, args.muon_scalar_optimizer),
        families=("lion_",),
    ),
    dependent(needs="--optimizer sgd", met=is_one_of("optimizer", "sgd"), names=("sgd_momentum",)),
    dependent(
        needs="an --optimizer that has Adam in it (adam, soap, or muon with "
        "--muon-scalar-optimizer adam)",
        met=lambda args: (
            args.optimizer not in ("sgd", "lion")
            and not ("muon" in args.optimizer and args.muon_scalar_optimizer == "lion")
        ),
        families=("adam_",),
    ),
    dependent_on(
        "optimizer_cpu_offload",
        families=("pin_cpu_",),
        names=(
            *("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
            "overlap_cpu_optimizer_d2h_h2d",
        ),
    ),
    dependent(
        needs="--lr-decay-style WSD", met=is_one_of("lr_decay_style", "WSD"), families=("lr_wsd_",)
    ),
    dependent_on("decoupled_lr", names=("decoupled_min_lr",)),
    # Parallelism.
    dependent_on("tp_comm_overlap", families=("tp_comm_",)),
    dependent(
        needs="virtual stages (--num-layers-per-virtual-pipeline-stage, "
        "--num-virtual-stages-per-pipeline-rank or --pipeline-model-parallel-layout)",
        met=any_given(
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        ),
        names=("microbatch_group_size_per_vp_stage", "overlap_p2p_comm_warmup_flush"),
    ),
    dependent_on(
        "use_megatron_fsdp",
        families=("megatron_fsdp_", "fsdp_", "outer_dp_", "data_parallel_sharding_"),
        names=(
            *("gradient_reduce_div_fusion", "suggested_communication_unit_size"),
            "strict_fsdp_dtensor_load",
        ),
    ),
    dependent_on("use_torch_fsdp2", families=("torch_fsdp2_",)),
    dependent(
        needs="--context-parallel-size 2 or more",
        met=lambda args: args.context_parallel_size > 1,
        names=("cp_comm_type",),
    ),
    # Checkpoints.
    dependent(
        needs="--save: nothing would be saved",
        met=any_given("save"),
        names=(
            *("save_interval", "save_retain_interval", "non_persistent_save_interval"),
            *("save_params_interval", "save_activations_interval", "save_wgrads_interval"),
            *("save_dgrads_interval", "async_save", "log_progress"),
        ),
    ),
    dependent(
        needs="--save or --ckpt-convert-format: nothing would be saved",
        met=any_given("save", "ckpt_convert_format"),
        names=("no_save_optim", "no_save_rng"),
    ),
    dependent(
        needs="--load or --pretrained-checkpoint: nothing would be loaded",
        met=any_given("load", "pretrained_checkpoint"),
        names=(
            *("ckpt_step", "no_load_optim", "no_load_rng", "finetune"),
            *("exit_on_missing_checkpoint", "load_main_params_from_ckpt"),
            *("override_ckpt_iteration", "ckpt_fully_parallel_load"),
        ),
    ),
    dependent_on(
        "use_checkpoint_args",
        names=("use_mp_args_from_checkpoint_args", "use_tokenizer_model_from_checkpoint_args"),
    ),
    dependent_on("async_save", families=("async_",), names=("use_persistent_ckpt_worker",)),
    dependent_on("non_persistent_save_interval", "load", families=("non_persistent_",)),
    dependent_on("replication", families=("replication_",)),
    dependent_on("ckpt_convert_format", names=("ckpt_convert_save",)),
    # Logs, profiles and whatever else watches a run.
    dependent_on(
        "tensorboard_dir",
        families=("tensorboard_",),
        names=(
            *("log_timers_to_tensorboard", "log_loss_scale_to_tensorboard"),
            "log_validation_ppl_to_tensorboard",
            *("log_memory_to_tensorboard", "log_world_size_to_tensorboard"),
        ),
    ),
    dependent_on("wandb_project", families=("wandb_",)),
    dependent_on(
        "profile",
        families=("profile_step_", "pytorch_profiler_"),
        names=("use_pytorch_profiler", "nvtx_ranges", "record_shapes"),
    ),
    dependent_on("profile", "record_memory_history", names=("profile_ranks",)),
    dependent_on("record_memory_history", names=("memory_snapshot_path",)),
    dependent_on("logits_save_dir", families=("logits_save_",)),
    dependent_on(
        "log_straggler", families=("straggler_",), names=("disable_straggler_on_startup",)
    ),
    dependent_on("enable_ft_package", names=("calc_ft_timeouts", "ft_num_warmup_iters")),
    dependent_on("fault_injector_ranks", "fault_injector_num_ranks", families=("fault_injector_",)),
    dependent_on("error_injection_rate", names=("error_injection_type",)),
    dependent_on("manual_gc", names=("manual_gc_interval", "manual_gc_eval")),
    # What a GPU, a backend or a kind of layers serves.
    dependent(
        needs="--transformer-impl transformer_engine",
        met=lambda args: args.transformer_impl != "local",
        names=(
            *("fused_residual_rmsnorm", "use_te_activation_func", "flash_attention_version"),
            *("use_transformer_engine_op_fuser", "te_precision_config_file"),
            *("cpu_offloading_num_layers", "experimental_attention_variant"),
            *("heterogeneous_layers_config_path", "batch_invariant_mode"),
        ),
    ),
    dependent(
        needs="--distributed-backend nccl",
        met=is_one_of("distributed_backend", "nccl"),
        families=("flight_recorder_", "sharp_"),
        names=(
            *("nccl_communicator_config_path", "use_sharp", "high_priority_stream_groups"),
            *("disable_symmetric_registration", "ddp_pad_buckets_for_high_nccl_busbw"),
            "create_all_gather_group",
        ),
    ),
    dependent(
        needs="a GPU, which this machine lacks",
        met=lambda args: torch.cuda.is_available(),
        names=(
            *("empty_unused_memory_level", "log_device_memory_used", "gpu_sniff_test_interval"),
            *("log_energy", "disable_bf16_reduced_precision_matmul"),
        ),
    ),
    dependent(
        needs="--cuda-graph-impl local or transformer_engine",
        met=lambda args: (
            args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
        ),
        families=("cuda_graph_",),
        but=("cuda_graph_impl",),
    ),
)
