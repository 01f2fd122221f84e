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
_THREADS = 4
"""Number of threads that read and hash, which they do without holding the interpreter's lock."""


def is_of_exit(name: str) -> bool:
    """Whether a tensor of `weight_shapes` belongs to an exit and not to the backbone."""
    return name.startswith(_EXITS)


@dataclass(frozen=True, slots=True)
class BaseReference:
    """A backbone, identified by its path and its content.

    Attributes:
        path: the checkpoint, absolute.
        hashes: `content_hash` of each of its tensors, by the names of `weight_shapes`.
    """

    path: str
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, location: CheckpointLocation, weights: LazyWeights) -> "BaseReference":
        """Read and hash the backbone among `weights`.

        Raises:
            ValueError: a tensor cannot be read.
        """
        names = [name for name in weights if not is_of_exit(name)]
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

    def checked(self, weights: LazyWeights) -> dict[str, LazyTensor]:
        """The same tensors, each of them compared with its hash when it is read.

        Raises:
            ValueError: the tensors are not those of the base. Reading a tensor raises it if its
                content differs.
        """
        self._check_names(name for name in weights if not is_of_exit(name))
        return {
            name: tensor if is_of_exit(name) else self._checked(name, tensor)
            for name, tensor in weights.items()
        }

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
        different = sorted(set(names) ^ set(self.hashes))
        if different:
            raise ValueError(
                f"the base has other tensors than {self.path}, which the exits were tuned on: "
                f"{different[0]} is in one of them only"
            )
