"""Batches for every pipeline stage that needs them, and the data sets they come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch as one pipeline stage sees it, each [b, s] or None where not needed."""

    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Reads microbatches on tensor-parallel rank 0 and hands them to the group.

    Attributes:
        groups: process groups of the model.
        micro_batch_size: samples in a microbatch of training.
        eval_micro_batch_size: samples in a microbatch of evaluation.
        seq_length: tokens in a sample.
    """

    groups: ProcessGroupCollection
    micro_batch_size: int
    eval_micro_batch_size: int
    seq_length: int

    def read(
        self, data: Iterator[dict[str, Tensor]], *, inputs: bool, targets: bool, training: bool
    ) -> Batch:
        """The next microbatch.

        Args:
            inputs: the stage embeds tokens.
            targets: the stage computes a loss, the final one or an exit's.
            training: train or evaluate.
        """
        if not (inputs or targets):
            return Batch()
        tp = self.groups.tp
        rank = torch.distributed.get_rank(tp)
        sample = next(data) if rank == 0 else {}
        parts = get_batch_on_this_tp_rank(
            {name: value.cuda(non_blocking=True) for name, value in sample.items()},
            has_cu_seqlens=False,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=False,
            broadcast_src_rank=torch.distributed.get_process_group_ranks(tp)[0],
            broadcast_group=tp,
            cp_size=torch.distributed.get_world_size(self.groups.cp),
            tp_rank=rank,
            micro_batch_size=self.micro_batch_size if training else self.eval_micro_batch_size,
            seq_length=self.seq_length,
            mtp_on_this_rank=False,
            # Megatron broadcasts by stage: everything when there is one, inputs to the first and
            # targets to the last. What this stage needs is expressed in those terms.
            pipeline_model_parallel_size=1 if inputs and targets else 2,
            is_pipeline_first_stage=inputs,
            is_pipeline_last_stage=targets,
        )
        parts = get_batch_on_this_cp_rank(parts, is_hybrid_cp=False, cp_group=self.groups.cp)
        return Batch(
            tokens=parts["tokens"] if inputs else None,
            labels=parts["labels"] if targets else None,
            loss_mask=parts["loss_mask"] if targets else None,
            position_ids=parts["position_ids"] if inputs else None,
        )


def dataset_provider(args: Any, tokenizer: Any) -> Callable[[list[int]], tuple[Any, Any, Any]]:
    """What `pretrain` calls with the numbers of samples to get train, validation and test sets.

    Data sets exist on every pipeline stage: any of them may have an exit.
    """

    def provide(num_samples: list[int]) -> tuple[Any, Any, Any]:
        kind = MockGPTDataset if args.mock_data else GPTDataset
        tp_rank_0 = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        built = BlendedMegatronDatasetBuilder(
            kind, num_samples, lambda: torch.distributed.get_rank(tp_rank_0) == 0, config(args)
        ).build()
        train, valid, test = built
        return train, valid, test

    def config(args: Any) -> GPTDatasetConfig:
        split = [args.train_data_path, args.valid_data_path, args.test_data_path]
        per_split = [get_blend_from_list(paths) for paths in split] if any(split) else None
        return GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=get_blend_from_list(args.data_path),
            blend_per_split=per_split,
            split=None if per_split else args.split,
            num_dataset_builder_threads=args.num_dataset_builder_threads,
            path_to_cache=args.data_cache_path,
            mmap_bin_files=args.mmap_bin_files,
            tokenizer=tokenizer,
            reset_position_ids=args.reset_position_ids,
            reset_attention_mask=args.reset_attention_mask,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=False,
            mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        )

    # Megatron then calls it on every rank: the builder synchronises all of them.
    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide
