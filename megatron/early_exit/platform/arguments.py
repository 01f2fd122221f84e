"""Megatron's flags on this machine: which defaults they get, and which values are refused."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.hardware.dtypes import DTYPES, dtype_speed
from megatron.early_exit.platform.machine import Platform


def set_argument_defaults(parser: ArgumentParser, platform: Platform) -> None:
    """Change the defaults of Megatron's flags to what the machine can do.

    For use inside `extra_args_provider`. Megatron's own `args_defaults` only fills in arguments
    that are None, so switches can only be set on the parser.

    Raises:
        RuntimeError: the installed Megatron lacks one of the flags.
    """
    defaults: dict[str, object] = {
        "distributed_backend": platform.backend,
        "transformer_impl": platform.transformer_impl,
        # The output projections are Megatron's own layers whatever the others are.
        "gradient_accumulation_fusion": platform.apex,
        # NVIDIA's internal telemetry, which nobody else can install.
        "enable_one_logger": False,
    }
    if not platform.transformer_engine:
        defaults |= {
            "no_persist_layer_norm": True,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
        }
    if not platform.compiled_fusions:
        defaults |= {
            "bias_gelu_fusion": False,
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
        }
    known = {action.dest for action in parser._actions}
    if missing := sorted(defaults.keys() - known):
        raise RuntimeError(f"Megatron no longer has the arguments {', '.join(missing)}")
    parser.set_defaults(**defaults)


def check_arguments(args: Namespace, platform: Platform) -> None:
    """Refuse flags that ask for what the machine lacks. Best called before Megatron's validation,
    which reports some of the same with a traceback.

    Raises:
        ValueError: naming the flag, its value and what is possible here.
    """
    if platform.num_devices < (ranks := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        allowed = (
            f"1 to {platform.num_devices}, one for each GPU (with CUDA_VISIBLE_DEVICES= the CPU is "
            "used)"
        )
        raise out_of_range("torchrun's --nproc-per-node", ranks, allowed)
    if args.transformer_impl != "local" and not platform.transformer_engine:
        raise ValueError(
            f"--transformer-impl {args.transformer_impl} needs a GPU and Transformer Engine, "
            "which this machine lacks; use --transformer-impl local"
        )
    if args.transformer_impl == "local":
        need = (
            "needs --transformer-impl transformer_engine"
            if platform.transformer_engine
            else "needs a GPU and Transformer Engine, which this machine lacks"
        )
        for flag, value in _transformer_engine_flags(args).items():
            if value:
                raise ValueError(f"{flag} {need}; leave it out")
    if args.transformer_impl == "local" and args.num_experts and args.add_bias_linear:
        # Megatron adds the experts' biases in place, to a tensor that autograd protects.
        raise ValueError(
            f"--num-experts {args.num_experts} with --transformer-impl local needs "
            "--disable-bias-linear: experts of local layers cannot have biases"
        )
    if platform.device == "cpu":
        if args.distributed_backend != "gloo":
            raise ValueError(
                f"--distributed-backend {args.distributed_backend} needs a GPU, which this machine "
                "lacks; use --distributed-backend gloo"
            )
        for flag, value in _cuda_flags(args).items():
            if value:
                raise ValueError(f"{flag} needs a GPU, which this machine lacks; leave it out")


def dtype_remark(args: Namespace, platform: Platform) -> str | None:
    """A sentence for those who ask for a number format that is slow on this machine.

    Raises:
        ValueError: the variable that says which formats are fast has an unknown value.
    """
    for name in ("bf16", "fp16"):
        if getattr(args, name):
            speed = dtype_speed(DTYPES[name], platform.device)
            if not speed.is_fast:
                return f"{speed.finding}: without --{name} training may be faster here"
    return None


def _transformer_engine_flags(args: Namespace) -> dict[str, bool]:
    """Flags that only Transformer Engine's layers implement, and whether they are given."""
    return {
        f"--fp8-format {args.fp8}": bool(args.fp8),
        f"--fp4-format {args.fp4}": bool(args.fp4),
        f"--context-parallel-size {args.context_parallel_size}": args.context_parallel_size > 1,
        "--moe-grouped-gemm": args.moe_grouped_gemm,
        "--tp-comm-overlap": args.tp_comm_overlap,
        "--te-rng-tracker": args.te_rng_tracker,
        f"--attention-backend {args.attention_backend.name}": args.attention_backend.name != "auto",
    }


def _cuda_flags(args: Namespace) -> dict[str, bool]:
    """Flags that need CUDA itself, and whether they are given."""
    return {
        f"--cuda-graph-impl {args.cuda_graph_impl}": args.cuda_graph_impl != "none",
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-nccl-ub": args.nccl_ub,
        "--optimizer-cpu-offload": args.optimizer_cpu_offload,
        "--optimizer-cuda-graph": args.optimizer_cuda_graph,
        "--profile": args.profile and not args.use_pytorch_profiler,
        "--record-memory-history": args.record_memory_history,
    }
