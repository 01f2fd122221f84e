"""Flags of Megatron that change what a step takes, and that the planner refuses by name."""

from argparse import SUPPRESS, ArgumentParser, Namespace

from megatron.early_exit.errors import as_flag

_WHAT = {
    "multi_latent_attention": "queries, keys and values of low rank",
    "moe_layer_freq": "layers with an MLP among those with experts",
    "moe_token_dispatcher_type": "dispatchers other than alltoall",
    "moe_shared_expert_overlap": "the MLP beside the experts has a time of its own",
    "overlap_moe_expert_parallel_comm": "training with exits refuses it",
    "moe_expert_capacity_factor": "no token is dropped",
    "fp4_format": "products in FP4",
    "fp8_output_proj": "training with exits refuses it",
    "recompute_modules": "recomputation of a few modules",
    "recompute_num_layers": "recomputation of some layers only",
    "window_size": "attention in a window",
    "use_megatron_fsdp": "weights that are shared by replicas",
    "use_torch_fsdp2": "weights that are shared by replicas",
    "num_distributed_optimizer_instances": "optimizers that not all replicas share",
    "optimizer_cpu_offload": "an optimizer on the CPU",
}
# What is modelled of them, so that a command line for training can have it.
_MODELLED = {"moe_token_dispatcher_type": "alltoall"}


def add_unmodelled_flags(parser: ArgumentParser) -> None:
    """Let a command line know them, without help."""
    for name in _WHAT:
        parser.add_argument(as_flag(name), nargs="*", help=SUPPRESS)


def refuse_unmodelled(args: Namespace) -> None:
    """Refuse them.

    Raises:
        ValueError: one of them is given.
    """
    for name, what in _WHAT.items():
        value = getattr(args, name)
        if value is not None and value != [_MODELLED.get(name)]:
            raise ValueError(f"{' '.join([as_flag(name), *value])} is not modelled: {what}")
