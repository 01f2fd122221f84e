"""What all exits of a model chunk use of the backbone: the matrix that they project with, and the
final norm.

A chunk that lacks one of them has a copy of it. `tied_weights` gives the copies the values of the
original, and sums the gradients of all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn import Module, Parameter

WORD_EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
_FINAL_NORM = "decoder.final_layernorm."
CAN_BE_COPIED = (WORD_EMBEDDING, OUTPUT_LAYER, f"{_FINAL_NORM}weight", f"{_FINAL_NORM}bias")
"""The names of the parameters of the backbone that exits may need on other stages, in the model and
in checkpoints."""


@dataclass(frozen=True, slots=True)
class SharedParts:
    """What a head uses that is not its own.

    Attributes:
        weight: [v, h], the matrix that it projects with (v: this tensor-parallel rank's part of the
            padded vocabulary); None if it has its own.
        norm: what comes last before the projection, [s, b, h] -> [s, b, h]; None for nothing.
    """

    weight: Tensor | None = None
    norm: Module | None = None


class BackboneParts(MegatronModule):
    """The parts of the backbone that the exits of one chunk share, and the chunk's copies of them.

    It is called before each use: the distributed optimizer waits for gathered parameters in a hook
    on the call.

    Args:
        config: the backbone's transformer config.
        vocab_size: padded vocabulary size.
        pg_collection: process groups.

    Attributes:
        matrix: the copy of the word embedding or of the output layer; None if exits have
            projections of their own, or the chunk has the original.
        norm: the copy of the final norm; None if exits do not use it, or the chunk has it.
        matrix_name: the parameter of the backbone that `matrix` is a copy of.
    """

    matrix: Parameter | None
    norm: Module | None

    def __init__(
        self, config: TransformerConfig, vocab_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.vocab_size = vocab_size
        self.tp_group = pg_collection.tp
        self.matrix = self.norm = None
        self.matrix_name = WORD_EMBEDDING
        self._find_matrix: Callable[[], Tensor | None] = lambda: self.matrix
        self._find_norm: Callable[[], Module | None] = lambda: self.norm

    def forward(self) -> SharedParts:
        """What the heads use: the chunk's own modules, or the copies of those that it lacks."""
        return SharedParts(self._find_matrix(), self._find_norm())

    def project_with(self, find: Callable[[], Tensor]) -> None:
        """Let exits project with a matrix of the chunk itself, [v / tp, h]."""
        self._find_matrix = find

    def normalize_with(self, find: Callable[[], Module]) -> None:
        """Let exits end with a norm of the chunk itself."""
        self._find_norm = find

    def copy_matrix(self, name: str) -> None:
        """Allocate a copy of a matrix over the vocabulary (filled by `connect_tied_weights`)."""
        rows = self.vocab_size // torch.distributed.get_world_size(self.tp_group)
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        shape = (rows, self.config.hidden_size)
        copy: Any = Parameter(torch.zeros(shape, dtype=self.config.params_dtype, device=device))
        copy.tensor_model_parallel, copy.partition_dim, copy.partition_stride = True, 0, 1
        copy.is_embedding_or_output_parameter = True
        copy.allreduce = True
        self.matrix, self.matrix_name = copy, name
        self._mark_copies()

    def copy_norm(self, norm: Module) -> None:
        """Take a norm as the copy of the final one (filled by `connect_tied_weights`)."""
        self.norm = norm
        self._mark_copies()

    def _mark_copies(self) -> None:
        # Megatron counts shared gradients once in their norm, on the original's stage.
        for copy in self.parameters():
            copy.shared = copy.shared_embedding = True  # type: ignore[attr-defined]

    @property
    def copies(self) -> dict[str, Parameter]:
        """The copied parameters, by the names of the originals."""
        return {self._original(name): parameter for name, parameter in self.named_parameters()}

    def _original(self, name: str) -> str:
        if name == "matrix":
            return self.matrix_name
        return _FINAL_NORM + name.removeprefix("norm.")

    def replicate(
        self, state: dict[str, Any], model_prefix: str, copy_number: int, metadata: dict[str, Any]
    ) -> None:
        """Make the copies further replicas of the originals in a checkpoint.

        Args:
            state: the sharded state of the chunk; the entries of copies are changed.
            model_prefix: what the names of all entries of the chunk start with.
            copy_number: 1 or more, another one for each chunk.
            metadata: Megatron's, with the data-parallel group.
        """
        prefix = f"{model_prefix}exits.backbone."
        for name in [name for name in state if name.startswith(prefix)]:
            key = model_prefix + self._original(name.removeprefix(prefix))
            if name == f"{prefix}matrix":
                dp_rank = torch.distributed.get_rank(metadata["dp_cp_group"])
                state[name] = make_tp_sharded_tensor_for_checkpoint(
                    tensor=self.matrix,
                    key=key,
                    replica_id=(1, copy_number, dp_rank),
                    allow_shape_mismatch=True,
                    tp_group=self.tp_group,
                    dp_cp_group=metadata["dp_cp_group"],
                )
            else:
                entry = state[name]
                entry.key, entry.replica_id = key, (copy_number, *entry.replica_id[1:])
