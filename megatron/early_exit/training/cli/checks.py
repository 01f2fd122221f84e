"""What a run refuses before any process group exists: flags and data sets that cannot work."""

import os
import struct
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Listener

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import _IndexReader
from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.ranges import BELOW_ONE, ONE_OR_MORE, Range
from megatron.early_exit.training.loop.data import DataSource, data_sources, read_blends
from megatron.early_exit.training.resume.plan import is_torch_dist

_SAMPLED_DOCUMENTS = 16
_SAMPLED_TOKENS = 4096


def check_arguments(args: Namespace, exits: EarlyExitConfig) -> None:
    """Refuse flags that contradict each other or are not served.

    Raises:
        ValueError: naming the flag, its value and what is allowed.
    """
    _check_support(args)
    ONE_OR_MORE.check_flags(args, "exit_loss_chunk_tokens", "eval_interval")
    tunes_ahead = args.tune_exit and args.mtp_num_layers
    if args.exit_loss_chunk_tokens is not None and not (exits.positions or tunes_ahead):
        raise ValueError("--exit-loss-chunk-tokens has no effect without --exit-layer-nums")
    if not (args.train_iters or args.train_samples or args.skip_train):
        raise ValueError("nothing says how long to train: give --train-iters or --train-samples")
    if not args.skip_train:
        _check_learning_rate(args)
    if args.async_save and not torch.cuda.is_available():
        raise ValueError("--async-save needs a GPU, which this machine lacks: leave it out")
    if args.save is not None:
        _check_temporary_folder()
    if not (exits.positions or tunes_ahead):
        return
    heads = "--exit-layer-nums" if exits.positions else "--tune-exit"
    for flag in ("use_torch_fsdp2", "use_megatron_fsdp"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} cannot be combined with {heads}, allowed: "
                "Megatron's own data parallelism, with or without --use-distributed-optimizer"
            )
    if args.moe_use_upcycling:
        raise ValueError(f"--moe-use-upcycling cannot be combined with {heads}")
    if not is_torch_dist(args):
        raise ValueError(
            f"--ckpt-format {args.ckpt_format} cannot be combined with {heads}, allowed: torch_dist"
        )


def _check_learning_rate(args: Namespace) -> None:
    """Check what Megatron only asserts once every process has built its model."""
    if args.lr is None:
        raise ValueError("nothing says how fast to learn: give --lr")
    rates = Range(least=0, most=args.lr, most_means="--lr")
    rates.check_flags(args, "lr_warmup_init", "min_lr")
    unit = "iters" if args.train_iters else "samples"
    decay = getattr(args, f"lr_decay_{unit}")
    length = f"--train-{unit}" if decay is None else f"--lr-decay-{unit}"
    decay = getattr(args, f"train_{unit}") if decay is None else decay
    ONE_OR_MORE.check(**{length: decay})
    if args.lr_warmup_fraction is None:
        warmup = Range(least=0, most=decay, excludes_most=True, most_means=length)
        warmup.check_flags(args, f"lr_warmup_{unit}")
    BELOW_ONE.check_flags(args, "lr_warmup_fraction")


def _check_temporary_folder() -> None:
    """Refuse a folder without room for the socket over which Megatron's processes talk that write a
    checkpoint."""
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise ValueError(
            f"TMPDIR {tempfile.gettempdir()}: checkpoints cannot be saved with it ({error}), "
            "allowed: a folder to write to with a name of at most 75 bytes"
        ) from None


def _check_support(args: Namespace) -> None:
    if args.dataloader_type not in ("single", "cyclic"):
        raise ValueError(
            f"--dataloader-type {args.dataloader_type} is not supported, allowed: single, cyclic"
        )
    if args.reset_position_ids and args.position_embedding_type != "learned_absolute":
        raise ValueError(
            f"--reset-position-ids with --position-embedding-type {args.position_embedding_type} "
            "is not supported, allowed: learned_absolute"
        )
    if args.phase_transition_iterations and args.train_samples is None:
        raise ValueError("--phase-transition-iterations needs --train-samples")


def check_data(args: Namespace, vocabulary: int) -> None:
    """Refuse data sets that are missing, damaged, empty or for another vocabulary.

    Only looks at a few documents of each; for rank 0.

    Args:
        args: what the run was started with.
        vocabulary: the number of the tokenizer's tokens. The model may have more rows than that,
            which stand for no token.

    Raises:
        ValueError: naming the flag, the data set and what is wrong with it.
    """
    _check_cache(args)
    if args.mock_data:
        return
    sources = data_sources(args)
    if not sources:
        raise ValueError("there is no data: give --data-path, or --mock-data for random tokens")
    _check_splits(args)
    _check_weights(args, sources)
    for source in sources:
        if is_object_storage_path(source.prefix):
            _check_object_storage(args, source)
            continue
        documents = _check_files(source, min(vocabulary, args.padded_vocab_size))
        if args.split is not None:
            _check_shares(source, documents, args.split)


def _check_cache(args: Namespace) -> None:
    """Refuse a cache that cannot be written: Megatron would fail there once the model is built."""
    folder = args.data_cache_path
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--data-cache-path {folder} cannot be used: {error.strerror}, allowed: a folder to "
            "write to"
        ) from error


def _check_splits(args: Namespace) -> None:
    """Refuse splits with which Megatron would train or evaluate on nothing, or crash."""
    _, per_split = read_blends(args)
    if per_split is not None:
        if args.split is not None:
            raise ValueError(
                f"--split {args.split} cannot be combined with data sets for each split"
            )
        has_training, has_validation, _ = (one is not None for one in per_split)
    else:
        if args.split is None:
            raise ValueError("--data-args-path needs --split, for example --split 98,2,0")
        has_training, has_validation, _ = (share > 0 for share in _shares(args.split))
    if not (has_training or args.skip_train):
        raise ValueError("there is no data to train on: give --train-data-path or another --split")
    if not has_validation and args.eval_iters:
        raise ValueError(
            f"--eval-iters {args.eval_iters} needs data to validate on, give --valid-data-path or "
            "another --split, or --eval-iters 0"
        )


def _check_weights(args: Namespace, sources: list[DataSource]) -> None:
    flags = {source.prefix: source.flag for source in sources}
    blend, per_split = read_blends(args)
    for prefixes, weights in filter(None, per_split or [blend]):
        if weights and not _are_weights(weights):
            raise ValueError(
                f"the weights {' '.join(map(str, weights))} in {flags[prefixes[0]]} are out of "
                "range, allowed: 0 or more, and not all of them 0"
            )


def _shares(split: str) -> list[float]:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not _are_weights(shares):
        allowed = (
            "the shares of training, validation and test with commas between them, 0 or more, for "
            "example 98,2,0"
        )
        raise out_of_range("--split", split, allowed)
    return shares + [0.0] * (3 - len(shares))


def _are_weights(numbers: list[float]) -> bool:
    return all(0 <= number < float("inf") for number in numbers) and sum(numbers) > 0


def _check_object_storage(args: Namespace, source: DataSource) -> None:
    if args.object_storage_cache_path is None:
        raise ValueError(f"{source} needs --object-storage-cache-path")
    if args.mmap_bin_files:
        raise ValueError(f"{source} needs --no-mmap-bin-files")
    package = "boto3" if source.prefix.startswith("s3:") else "multistorageclient"
    if find_spec(package) is None:
        raise ValueError(f"{source} needs the Python package {package}, which is not installed")


def _check_shares(source: DataSource, documents: int, split: str) -> None:
    """Refuse shares without a document: Megatron would look for samples in them for ever."""
    ends = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for name, share in zip(("training", "validation", "test"), ends, strict=True):
        if share is not None and round(share[0] * documents) == round(share[1] * documents):
            problem = f"leaves none of the {documents} documents of {source} for {name}"
            raise FieldError("--split", problem, "a larger share, or 0", value=split)


def _check_files(source: DataSource, vocabulary: int) -> int:
    """Refuse a data set that is missing, damaged or of another vocabulary.

    Returns:
        The number of its documents.
    """
    idx, data = f"{source.prefix}.idx", f"{source.prefix}.bin"
    for file in (idx, data):
        if not os.path.isfile(file):
            raise ValueError(f"{source}: there is no file {file}")
    try:
        index = _IndexReader(idx, multimodal=False)
    except (AssertionError, OSError, ValueError, struct.error) as error:
        raise ValueError(f"{source}: {idx} is damaged or no index ({error})") from error
    lengths, offsets = index.sequence_lengths, index.sequence_pointers
    if index.document_count < 1 or index.document_indices[-1] != len(lengths):
        raise ValueError(f"{source}: {idx} is damaged")
    if len(lengths) == 0:
        raise ValueError(f"{source} has no documents")
    size = int(offsets[-1]) + int(lengths[-1]) * index.dtype_size
    if (found := os.path.getsize(data)) < size:
        raise ValueError(f"{source}: {data} is cut short, it has {found} bytes of {size}")
    for token in _sampled_tokens(data, index):
        if not 0 <= token < vocabulary:
            allowed = (
                f"0 to {vocabulary - 1}; is it made with another tokenizer? (with that of EE-LLM "
                "and older Megatron: --tokenizer-sentencepiece-legacy)"
            )
            raise out_of_range(f"{source}: the token", token, allowed)
    return len(lengths)


def _sampled_tokens(data: str, index: _IndexReader) -> Iterator[int]:
    """The least and the largest tokens of some documents."""
    lengths, offsets = index.sequence_lengths, index.sequence_pointers
    for document in np.linspace(0, len(lengths) - 1, _SAMPLED_DOCUMENTS, dtype=int):
        length, offset = int(lengths[document]), int(offsets[document])
        begin = np.fromfile(data, index.dtype, min(length, _SAMPLED_TOKENS), offset=offset)
        # The token that ends documents is often the largest.
        last = offset + max(length - 1, 0) * index.dtype_size
        tokens = np.append(begin, np.fromfile(data, index.dtype, min(length, 1), offset=last))
        yield from (int(tokens.min(initial=0)), int(tokens.max(initial=0)))
