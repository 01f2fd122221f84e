"""Batches for every pipeline stage that needs them, and the data sets they come from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron.early_exit.errors import as_flag

Blend = tuple[list[str], list[float] | None]
"""Prefixes of indexed data sets, and the weight of each."""


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
            data: samples, whose entries are [b, s]; only the first rank of a tensor-parallel group
                reads them.
            inputs: the stage embeds tokens, at its beginning or to look ahead at its end.
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

    def own_tokens(self, values: Tensor) -> Tensor:
        """Of values for each token of a microbatch, [b, s], those of this rank's part of the
        sequences, where context parallelism divides them."""
        parts = {"values": values}
        parts = get_batch_on_this_cp_rank(parts, is_hybrid_cp=False, cp_group=self.groups.cp)
        return parts["values"]


class DataSource(NamedTuple):
    """An indexed data set: what the names of its files begin with, and the flag that says so."""

    flag: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.flag} {self.prefix}"


_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
# One of these groups says where the data come from.
_WAYS = (("data_path",), ("data_args_path",), _PER_SPLIT, ("per_split_data_args_path",))


def read_blends(args: Any) -> tuple[Blend | None, list[Blend | None] | None]:
    """The data sets to draw from: one blend to be split, or one for each split, or neither.

    Raises:
        ValueError: flags contradict each other, or the file that one names cannot be used.
    """
    given = [name for names in _WAYS for name in names if getattr(args, name) is not None]
    if args.mock_data:
        given.append("mock_data")
    ways = [names for names in (*_WAYS, ("mock_data",)) if not {*names}.isdisjoint(given)]
    if len(ways) > 1:
        first, second = (as_flag(next(name for name in way if name in given)) for way in ways[:2])
        raise ValueError(f"{first} cannot be combined with {second}")
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        path = getattr(args, given[0])
        raise ValueError(f"{as_flag(given[0])} {path} cannot be read: {error.strerror}") from error
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        wanted = "prefixes, or weights and prefixes in turn"
        if given == ["per_split_data_args_path"]:
            wanted = f"a JSON object with train, valid and test, each {wanted}"
        flags = " or ".join(_given(args, name) for name in given)
        raise ValueError(f"{flags} cannot be understood, allowed: {wanted}") from error
    return blend, per_split


def _given(args: Any, name: str) -> str:
    value = getattr(args, name)
    return " ".join([as_flag(name), *(value if isinstance(value, list) else [str(value)])])


def data_sources(args: Any) -> list[DataSource]:
    """The indexed data sets of a run, each once.

    Raises:
        ValueError: see `read_blends`.
    """
    blend, per_split = read_blends(args)
    flags = ["data_args_path" if args.data_path is None else "data_path"]
    if args.per_split_data_args_path is not None:
        flags = ["per_split_data_args_path"] * len(_PER_SPLIT)
    elif per_split is not None:
        flags = [*_PER_SPLIT]
    found: dict[str, DataSource] = {}
    for name, one in zip(flags, per_split or [blend], strict=True):
        for prefix in one[0] if one is not None else ():
            found.setdefault(prefix, DataSource(as_flag(name), prefix))
    return list(found.values())


def dataset_config(args: Any, tokenizer: Any) -> GPTDatasetConfig:
    """What the command line says about data sets, for Megatron's.

    Raises:
        ValueError: see `read_blends`.
        AssertionError: Megatron refuses a combination.
    """
    blend, per_split = read_blends(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        # Attention is causal in itself.
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        sequences_per_dataset=_sequences_per_dataset(args, blend, per_split),
    )


def _sequences_per_dataset(
    args: Any, blend: Blend | None, per_split: list[Blend | None] | None
) -> dict[str, Any] | None:
    """Numbers of sequences and of documents by prefix, which then are not read from the indices."""
    path = args.per_dataset_sequences_path
    if path is None:
        return None
    try:
        counts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--per-dataset-sequences-path {path} cannot be read: {error}") from error
    prefixes = {prefix for one in per_split or [blend] if one is not None for prefix in one[0]}
    if not isinstance(counts, dict) or not prefixes <= counts.keys():
        raise ValueError(
            f"--per-dataset-sequences-path {path} does not have the counts of all data sets, "
            f"needed: a JSON object with {', '.join(sorted(prefixes))}"
        )
    return counts


def dataset_provider(args: Any, tokenizer: Any) -> Callable[[list[int]], tuple[Any, Any, Any]]:
    """What `pretrain` calls with the numbers of samples to get train, validation and test sets.

    Data sets exist on every pipeline stage: any of them may have an exit.

    Raises:
        ValueError, AssertionError: see `dataset_config`.
    """
    config = dataset_config(args, tokenizer)
    # For Megatron's own reading of batches, of --iterations-to-skip.
    args.create_attention_mask_in_dataloader = config.create_attention_mask

    def provide(num_samples: list[int]) -> tuple[Any, Any, Any]:
        kind = MockGPTDataset if args.mock_data else GPTDataset
        tp_rank_0 = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        built = BlendedMegatronDatasetBuilder(
            kind, num_samples, lambda: torch.distributed.get_rank(tp_rank_0) == 0, config
        ).build()
        train, valid, test = built
        return train, valid, test

    # Megatron then calls it on every rank: the builder synchronises all of them.
    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide
