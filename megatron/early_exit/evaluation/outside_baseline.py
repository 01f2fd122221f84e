"""Hugging Face's transformers on the weights of a model of ours, as the baseline from outside."""

import gc
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron.early_exit.checkpoint.huggingface import open_export
from megatron.early_exit.errors import one_line
from megatron.early_exit.hardware.resources import available_memory

_FOLDER_PREFIX = "early-exit-baseline-"
_GB = 10**9
_ROWS = 128
"""Positions whose logits are made fp32 together."""


class OutsideError(RuntimeError):
    """The other program has failed at an answer or a score: no memory, say, or an overflow."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Stands for a baseline with which a measurement has begun, and without which it goes on.

    Attributes:
        reason: why it is not measured any more.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class OutsideToken:
    """What the model says of a token of a given text.

    Attributes:
        logprob: its log-probability.
        best: the token that is most probable in its place.
    """

    logprob: float
    best: int


class OutsideBaseline:
    """A model of transformers, decoded by its own `generate` as users find it: greedily, with its
    default cache and attention, and not compiled.

    Args:
        model: one of transformers' models for causal language modelling.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, dtype: torch.dtype, device: torch.device
    ) -> "OutsideBaseline":
        """Load a checkpoint without its exits, by way of a temporary folder, which needs as much
        room as the weights and is gone afterwards.

        Args:
            path: a save directory, or one iteration in it.
            dtype: of weights and arithmetic.
            device: where it is computed.

        Raises:
            ImportError: transformers is not installed.
            ValueError: transformers has no model like it, or does not load it; or there is no room
                for the folder or for the weights in memory.
            OSError: the folder cannot be written.
        """
        from transformers import AutoModelForCausalLM

        export = open_export(path, plain=True)
        if export.needs_remote_code:
            raise ValueError("transformers has no class of its own for the model")
        weights = sum(math.prod(one.shape) for one in export.weights.values()) * dtype.itemsize
        with tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX) as folder:
            _check_room(Path(folder), export.num_bytes, weights)
            target = Path(folder) / "model"
            export.write(target)
            model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
            model = model.to(device)
            if device.type == "cpu":
                for tensor in chain(model.parameters(), model.buffers()):
                    # What is mapped from the folder's files would keep their room after its end.
                    tensor.data = tensor.data.clone()
        return cls(model)

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Continue prompts together, each by so many tokens; none of them ends a text.

        Args:
            prompts: their tokens. Shorter ones are padded in front.
            count: of the tokens of each answer.

        Raises:
            OutsideError: transformers has failed.
        """
        longest = max(map(len, prompts))
        padding = [longest - len(one) for one in prompts]
        tokens = [[0] * pad + list(one) for pad, one in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        device = self.model.device
        own = self.model.generation_config
        # No token ends an answer, unlike in the configuration that comes with the model.
        self.model.generation_config = type(own)(
            do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
        )
        try:
            with _failing_as_one(), torch.inference_mode():
                found = self.model.generate(
                    torch.tensor(tokens, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                )
                answers: list[list[int]] = found[:, longest:].tolist()
        finally:
            self.model.generation_config = own
        return answers

    def score(self, tokens: Sequence[int]) -> list[OutsideToken]:
        """Score every token of a text but the first, in one pass.

        Args:
            tokens: the text, 2 tokens or more.

        Raises:
            OutsideError: transformers has failed, or its logits are not finite.
        """
        found: list[OutsideToken] = []
        with _failing_as_one(), torch.inference_mode():
            given = torch.tensor([list(tokens)], device=self.model.device)
            logits = self.model(given, use_cache=False).logits[0, :-1]
            # In fp32, all rows of a long text together would need more memory than the model does.
            for rows, own in zip(logits.split(_ROWS), given[0, 1:].split(_ROWS), strict=True):
                found += _tokens(rows.float(), own)
        return found

    def release(self) -> None:
        """Give the weights' memory back; nothing can be asked for afterwards."""
        self.model = None
        free_unused()


def _check_room(folder: Path, file_bytes: int, weight_bytes: int) -> None:
    """Refuse a model for which there is no room.

    Args:
        folder: that it goes through.
        file_bytes: of its files there.
        weight_bytes: of its weights in memory, where they are on their way to a GPU, too.

    Raises:
        ValueError: see above; the message has both sizes.
    """
    free = shutil.disk_usage(folder).free
    if file_bytes > free:
        raise ValueError(
            f"its files need {file_bytes / _GB:.1f} GB in {folder.parent}, which has "
            f"{free / _GB:.1f} GB; the environment variable TMPDIR names another folder"
        )
    needed = weight_bytes + (file_bytes if _is_in_memory(folder) else 0)
    available = available_memory()
    if needed > available:
        raise ValueError(
            f"it needs {needed / _GB:.1f} GB of memory, and {available / _GB:.1f} GB are available"
        )


def _is_in_memory(folder: Path) -> bool:
    """Whether files of the folder are kept in memory."""
    path = folder.resolve()
    mounts = [
        one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)
    ]
    # A later one of the same place hides the former.
    own = max(enumerate(mounts), key=lambda one: (len(one[1].mountpoint), one[0]), default=None)
    return own is not None and own[1].fstype in ("tmpfs", "ramfs")


def free_unused() -> None:
    """Give back what a failure has left: memory that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tokens(logits: torch.Tensor, given: torch.Tensor) -> list[OutsideToken]:
    """The tokens of some places [l], by the logits there [l, v]."""
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("its logits are not finite")
    logprobs = logits.log_softmax(-1).gather(-1, given[:, None])[:, 0].tolist()
    best = logits.argmax(-1).tolist()
    return [OutsideToken(*one) for one in zip(logprobs, best, strict=True)]


@contextmanager
def _failing_as_one() -> Iterator[None]:
    """Whatever fails in the other program's code, of which we know nothing, is one error."""
    try:
        yield
    except Exception as error:
        raise OutsideError(f"transformers has failed: {one_line(error)}") from error
