"""Distributed checkpoints as Megatron writes them, written quickly by one process."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


ARGS = {
    "num_layers": 4,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "kv_channels": 4,
    "group_query_attention": False,
    "padded_vocab_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": False,
    "params_dtype": torch.float32,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "use_distributed_optimizer": False,
    "exit_layer_nums": [],
}


def save(
    save_dir: Path,
    iteration: int,
    tensors: dict[str, Tensor] | None = None,
    named: bool = True,
    content_metadata: dict[str, object] | None = None,
    **args: object,
) -> Path:
    """Write a whole checkpoint of `iteration`; if `named`, the text file names it.

    Args:
        tensors: further tensors, besides the word embedding and a norm.
        args: arguments that replace `ARGS`.
    """
    path = save_dir / f"iter_{iteration:07d}"
    common = {
        "args": Namespace(**{**ARGS, **args}),
        "iteration": iteration,
        "content_metadata": content_metadata or {},
    }
    state = {
        "common_state/shard_0_1": [common],
        "embedding.word_embeddings.weight": torch.zeros(16, 8),
        "decoder.final_layernorm.weight": torch.ones(8),
        **(tensors or {}),
    }
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=_Writer(str(path)), planner=planner, no_dist=True)
    (path / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    if named:
        name(save_dir, str(iteration))
    return path


def name(save_dir: Path, text: str) -> None:
    """Write the text file that names the last checkpoint."""
    (save_dir / "latest_checkpointed_iteration.txt").write_text(text)
