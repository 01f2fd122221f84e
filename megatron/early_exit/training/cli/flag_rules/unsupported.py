"""Flags that Megatron's one parser has for other programs, or no longer reads, and why a training
run of this package refuses them.

They would be taken without a word and change nothing.
`tests/unit/training/cli/test_flag_rules.py` compares this table with what the installed Megatron
reads.
"""

from megatron.early_exit.training.cli.flag_rules.rule import unsupported

_NOT_READ = "Megatron no longer reads it"
_WHOLE_SEQUENCE = "attention goes over the whole sequence"
_NO_FIM = "there are no fill-in-the-middle data"
_ONE_VALIDATION_SET = "validation takes --eval-iters batches of one set"
_DEPTH = "a GPT has --num-layers only"

UNSUPPORTED = (
    # Without a reader anywhere.
    unsupported(
        names=("rampup_batch_size",),
        reason=f"{_NOT_READ}; use --step-batch-size-schedule 'TOKENS:BATCH TOKENS:BATCH ...', for "
        "example '0:32 1B:64 4B:128'",
    ),
    unsupported(
        names=("use_flash_attn",),
        reason=f"{_NOT_READ}; --attention-backend flash asks Transformer Engine for it, and local "
        "layers use PyTorch's fused attention anyway: leave it out",
    ),
    unsupported(
        names=("checkpoint_activations",),
        reason="use --recompute-activations, or --recompute-granularity and --recompute-method",
    ),
    unsupported(
        names=("openai_gelu",),
        reason=f"{_NOT_READ}; the activation is GELU, or with --swiglu, --squared-relu or "
        "--quick-geglu another",
    ),
    unsupported(
        names=("exit_signal_handler_for_dataloader",),
        reason=f"{_NOT_READ}; --exit-signal-handler keeps data loaders from the signal too",
    ),
    unsupported(
        names=("dist_ckpt_save_pre_mcore_014",),
        reason=f"{_NOT_READ}; --ckpt-format chooses the format of checkpoints",
    ),
    unsupported(
        names=("dist_ckpt_format_deprecated",),
        met=lambda args: args.dist_ckpt_format_deprecated == args.ckpt_format,
        reason=f"{_NOT_READ}; --ckpt-format chooses the format of checkpoints",
    ),
    unsupported(
        names=("enable_full_sharding_in_hsdp",),
        reason=f"{_NOT_READ}; use --outer-dp-sharding-strategy",
    ),
    unsupported(
        names=("apply_residual_connection_post_layernorm", "onnx_safe"),
        reason=_NOT_READ,
    ),
    # Of Megatron's other programs.
    unsupported(
        families=("rl_", "grpo_"),
        names=("perform_rl_step", "refit_method", "langrl_env_config"),
        reason="reinforcement learning is another program of Megatron",
    ),
    unsupported(
        families=("dino_", "vision_"),
        names=(
            *("num_classes", "img_h", "img_w", "num_channels", "patch_dim", "classes_fraction"),
            *("data_per_class_fraction", "head_lr_mult", "swin_backbone_type", "mask_type"),
            *("mask_factor", "iter_per_epoch"),
        ),
        reason="training on images is another program of Megatron",
    ),
    unsupported(
        families=("bert_", "biencoder_", "ict_", "retriever_", "indexer_", "output_bert_"),
        names=(
            *("titles_data_path", "query_in_block_prob", "use_one_sent_docs", "embedding_path"),
            *("evidence_data_path", "block_data_path"),
        ),
        reason="BERT and retrieval are other programs of Megatron",
    ),
    unsupported(names=("decoder_num_layers",), reason=_DEPTH),
    unsupported(
        names=("relative_attention_num_buckets", "relative_attention_max_distance"),
        reason="only T5 has relative positions",
    ),
    unsupported(
        families=("mamba_", "hybrid_layer_", "hybrid_override_", "mtp_hybrid_"),
        names=("is_hybrid_model", "use_mamba_mem_eff_path"),
        reason="exits are those of a GPT, not of a hybrid model with Mamba layers",
    ),
    unsupported(
        families=("inference_",),
        # A random number generator that training uses too.
        but=("inference_rng_tracker",),
        names=(
            *("flash_decode", "nccl_all_reduce_for_prefill", "mlp_chunks_for_prefill"),
            *("cache_mla_latents", "moe_pad_experts_for_cuda_graph_inference"),
            *("enable_chunked_prefill", "num_speculative_tokens", "decode_only_cuda_graphs"),
            *("offset_sampling_seed_by_dp_rank", "max_tokens_to_oom", "symmetric_ar_type"),
            "use_legacy_static_engine",
        ),
        reason="this command trains; tools/generate.py and "
        "tools/run_early_exit_text_generation_server.py have flags of their own",
    ),
    unsupported(
        families=("inprocess_",),
        reason="runs are not restarted inside their processes; torchrun --max-restarts does it "
        "from outside",
    ),
    unsupported(
        families=("one_logger_", "app_tag_run_", "adlr_autoresume"),
        reason="it belongs to NVIDIA's own clusters",
    ),
    unsupported(
        families=("logits_load_",),
        reason="exits learn from the data, or with --tune-exit from the model's own final head "
        "(--exit-distillation-weight)",
    ),
    unsupported(
        names=("spec",),
        reason="--transformer-impl chooses the layers",
    ),
    # About data.
    unsupported(
        names=(
            *("reset_attention_mask", "dataloader_inter_document_masking"),
            *("hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"),
        ),
        reason=_WHOLE_SEQUENCE,
    ),
    unsupported(names=("sft", "sft_tokenizer_prompt_format"), reason="data sets are indexed text"),
    unsupported(families=("fim_",), reason=_NO_FIM),
    unsupported(names=("sample_rate",), reason="GPTs train on every sample"),
    unsupported(names=("mask_prob",), reason="GPTs have no masked tokens"),
    unsupported(names=("short_seq_prob",), reason="GPTs have no short sequences"),
    unsupported(names=("decoder_seq_length",), reason="GPTs have --seq-length only"),
    # In Megatron they need one another, microbatches of one, and no test set.
    unsupported(
        names=("full_validation", "multiple_validation_sets", "validation_set_names"),
        reason=_ONE_VALIDATION_SET,
    ),
)
