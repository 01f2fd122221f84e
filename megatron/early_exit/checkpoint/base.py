"""The model that an exits-only checkpoint belongs to.

EE-Tuning (arXiv 2402.00518) trains only exits, and saves only them; the rest of the model stays in
the checkpoint with which tuning started. That base model is identified by the hashes of its
tensors, so that it is recognised after it has been moved, or written again in another layout.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron.early_exit.checkpoint.lazy import LazyTensor, LazyWeights, content_hash
from megatron.early_exit.checkpoint.location import CheckpointLocation, locate

_EXITS = "exits."
_MTP = "mtp."
_THREADS = 4
"""Number of threads that read and hash, which they do without holding the interpreter's lock."""


def is_of_exit(name: str) -> bool:
    """Whether a tensor of `weight_shapes` belongs to an exit and not to the backbone."""
    return name.startswith(_EXITS)


def is_of_mtp(name: str) -> bool:
    """Whether a tensor of `weight_shapes` belongs to the multi-token-prediction module."""
    return name.startswith(_MTP)


@dataclass(frozen=True, slots=True)
class BaseReference:
    """A backbone, identified by its path and its content.

    The base's multi-token-prediction module is a part of it, unless that was tuned with the exits.

    Attributes:
        path: the checkpoint, absolute.
        hashes: `content_hash` of each of its tensors, by the names of `weight_shapes`.
    """

    path: str
    hashes: Mapping[str, str]

    @classmethod
    def of(
        cls, location: CheckpointLocation, weights: LazyWeights, tunes_mtp: bool = False
    ) -> "BaseReference":
        """Read and hash the backbone among `weights`.

        Args:
            location: of the checkpoint.
            weights: of the model in it.
            tunes_mtp: its multi-token-prediction module, if it has one, is tuned with the exits,
                and so is no part of what stays.

        Raises:
            ValueError: a tensor cannot be read.
        """
        names = [
            name for name in weights if not (is_of_exit(name) or (tunes_mtp and is_of_mtp(name)))
        ]
        with ThreadPoolExecutor(_THREADS) as threads:
            hashes = threads.map(lambda name: content_hash(weights[name].read()), names)
            found = dict(zip(names, hashes, strict=True))
        return cls(str(location.iteration_dir.resolve()), found)

    def find(self, save_dir: Path) -> CheckpointLocation:
        """Find the checkpoint of the base.

        Args:
            save_dir: directory of the exits-only checkpoint, for the error message.

        Raises:
            ValueError: it is not there.
        """
        if not Path(self.path).is_dir():
            raise ValueError(
                f"checkpoint {save_dir}: holds exits only, and their base {self.path} is not "
                "there: put it back, or join the two with tools/checkpoint.py merge-exits"
            )
        return locate(self.path)

    def lacks(self, name: str) -> bool:
        """Whether a tensor of `weight_shapes` is stored with the exits and not in the base."""
        return is_of_exit(name) or (is_of_mtp(name) and name not in self.hashes)

    def checked(self, weights: LazyWeights) -> dict[str, LazyTensor]:
        """The same tensors, each of them compared with its hash when it is read.

        Raises:
            ValueError: the tensors are not those of the base. Reading a tensor raises it if its
                content differs.
        """
        self._check_names(name for name in weights if not self.lacks(name))
        return {
            name: tensor if self.lacks(name) else self._checked(name, tensor)
            for name, tensor in weights.items()
        }

    def checked_if_known(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """The same tensor, compared with its hash when it is read if it was in the base."""
        return self._checked(name, tensor) if name in self.hashes else tensor

    def _checked(self, name: str, tensor: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            found = tensor.read()
            if content_hash(found) != self.hashes[name]:
                raise ValueError(
                    f"{name} is not the one that the exits were tuned on (their base was "
                    f"{self.path}): give that model"
                )
            return found

        return replace(tensor, read=read)

    def _check_names(self, names: Iterable[str]) -> None:
        found = set(names)
        # A model may be described without the multi-token-prediction module that its base has.
        known = {name for name in self.hashes if name in found or not is_of_mtp(name)}
        different = sorted(found ^ known)
        if different:
            raise ValueError(
                f"the base has other tensors than {self.path}, which the exits were tuned on: "
                f"{different[0]} is in one of them only"
            )
