"""Measures what the parts of a model take on this machine, on a few of its layers.

A part is the difference between two chunks of a model that take turns: a stage in the middle of a
pipeline with one layer, and the same with two layers more, with the embedding, with the final head,
or with an exit. What a pass takes beside its parts is in both, and so is not in the difference.
Chunks are as in training: gradients are added up in fp32, and an exit's loss is deferred to the
backward.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.gpt_builder import EarlyExitGPTModelConfig
from megatron.early_exit.model.layer_specs import gpt_layer_spec
from megatron.early_exit.planner.costs.layer_profile import Part, Pass
from megatron.early_exit.planner.costs.model_shape import ModelShape, padded_vocab_size
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.training.loss.exit_loss import ExitObjective, LossNormalization

_LAYERS, _MORE_LAYERS = 1, 3
_INIT_STD = 0.02

Progress = Callable[[Part, int], None]
Measured = dict[int, dict[Part, dict[Pass, float]]]


def llama_config(
    shape: ModelShape,
    exits: EarlyExitConfig,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> EarlyExitGPTModelConfig:
    """Megatron's configuration of a model on paper, with a projection of its own.

    Args:
        shape: of the model.
        exits: of the model.
        dtype: of weights and activations.
        options: more of a `TransformerConfig`, such as what the machine can do.
    """
    transformer = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        # The default is deprecated, and warns.
        cuda_graph_modules=[],
        **options,
    )
    return EarlyExitGPTModelConfig(
        transformer=transformer,
        # Megatron's annotation forgets the virtual stage, which it passes.
        transformer_layer_spec=gpt_layer_spec,  # type: ignore[arg-type]
        early_exit=exits,
        vocab_size=padded_vocab_size(shape.vocab_size),
        seq_length=shape.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


@dataclass(frozen=True, kw_only=True)
class PartProfiler:
    """Builds few layers of a model, and measures.

    Megatron's groups have to be there, with one process.

    Attributes:
        shape: of the model, however many layers it has.
        exits: of the model; one is built, with the heads that all have.
        dtype: of weights and activations.
        options: see `llama_config`.
    """

    shape: ModelShape
    exits: EarlyExitConfig
    dtype: torch.dtype
    options: Mapping[str, Any]

    def measure(self, sizes: Sequence[int], repeats: int, progress: Progress) -> Measured:
        """Seconds of each pass through each part, for microbatches of each number of sequences.

        Args:
            sizes: numbers of sequences.
            repeats: turns of each pair of chunks; the median of their differences counts, and none
                is below 0.
            progress: told of each part and size before it is measured.
        """
        base = self._chunk()
        parts: dict[Part, Callable[[], _Chunk]] = {
            "layer": lambda: self._chunk(num_layers=_MORE_LAYERS),
            "embedding": lambda: self._chunk(embeds=True),
            "head": lambda: self._chunk(ends=True),
        }
        if self.exits.positions:
            parts["exit"] = lambda: self._chunk(exits=_one_of(self.exits))
        found: Measured = {size: {} for size in sizes}
        for part, build in parts.items():
            more = build()
            share = 1 / (_MORE_LAYERS - _LAYERS) if part == "layer" else 1.0
            for size in sizes:
                progress(part, size)
                seconds = _differences(base, more, size, repeats)
                found[size][part] = {name: share * s for name, s in seconds.items()}
            # Before the next one is built: of large models few layers fit into memory. Gradients'
            # hooks and the chunk know each other.
            del more
            gc.collect()
        return found

    def _chunk(
        self,
        num_layers: int = _LAYERS,
        embeds: bool = False,
        ends: bool = False,
        exits: EarlyExitConfig | None = None,
    ) -> "_Chunk":
        shape, exits = replace(self.shape, num_layers=num_layers), exits or EarlyExitConfig()
        return _Chunk(llama_config(shape, exits, self.dtype, self.options), embeds, ends)


def _one_of(exits: EarlyExitConfig) -> EarlyExitConfig:
    """One exit with the heads that all have, but for gates: they cost nothing that counts, and
    learn from a final head, which is timed apart."""
    return replace(
        exits,
        exit_layer_nums=(_LAYERS,),
        pre_exit=False,
        use_exit_gate=False,
        exit_layer_weight=(),
        exit_layer_weight_init=(),
        exit_layer_temperature=(),
    )


def _differences(less: "_Chunk", more: "_Chunk", size: int, repeats: int) -> dict[Pass, float]:
    """What one chunk takes longer than the other, in the median of their turns."""
    turns = []
    # In the first, memory is taken and kernels are chosen.
    for _ in range(1 + repeats):
        turns.append((PassClock(), PassClock()))
        for chunk, clock in zip((less, more), turns[-1], strict=True):
            chunk.run(size, clock)
    seconds = [(one.total_s(), other.total_s()) for one, other in turns[1:]]
    forward_s, backward_s = (
        max(median(other[i] - one[i] for one, other in seconds), 0.0) for i in range(2)
    )
    return {"forward": forward_s, "backward": backward_s}


class _Chunk:
    """A stage of a model, alone.

    Args:
        config: of the model, which has the stage's layers only.
        embeds: it begins with the embedding.
        ends: it ends with the final head and its loss.
    """

    def __init__(self, config: EarlyExitGPTModelConfig, embeds: bool, ends: bool) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunk: Any = config.get_builder_cls()(config).build_model(groups, embeds, ends)
        self._module = chunk.to(config.transformer.params_dtype).cuda()
        if chunk.exits.backbone.matrix is not None:
            # There is no original to get its values from.
            torch.nn.init.normal_(chunk.exits.backbone.matrix, std=_INIT_STD)
        normalization = LossNormalization(per_token=False, context_parallel_size=1)
        chunk.exit_tap = ExitObjective(config.early_exit, normalization)
        gradients = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self._model = DistributedDataParallel(config.transformer, gradients, self._module)
        self._config, self._embeds, self._ends = config, embeds, ends
        self._positions = torch.arange(config.seq_length).cuda()

    def run(self, size: int, clock: PassClock) -> None:
        """A forward and a backward of a microbatch of so many sequences."""
        length = self._config.seq_length
        tokens = torch.empty((size, length), dtype=torch.long, device="cuda")
        tokens.random_(self._module.vocab_size)
        hidden = self._hidden(size).requires_grad_()
        gradient = None if self._ends else self._hidden(size)
        self._module.set_input_tensor(None if self._embeds else hidden)
        targets = {}
        if self._ends or self._module.exits.heads:
            targets = {"labels": tokens, "loss_mask": torch.ones_like(tokens)}
        with clock.time("forward"):
            output = self._model(tokens, self._positions.expand(size, length), None, **targets)
            if self._ends:
                output = output.float().mean()
        with clock.time("backward"):
            torch.autograd.backward(output, gradient)

    def _hidden(self, size: int) -> torch.Tensor:
        """Hidden states, or their gradients, [s, b, h]."""
        transformer = self._config.transformer
        shape = self._config.seq_length, size, transformer.hidden_size
        # Made on the device: a GPU that waits would have its start-up timed.
        return torch.empty(shape, dtype=transformer.params_dtype, device="cuda").normal_()
