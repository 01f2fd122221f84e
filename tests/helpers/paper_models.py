"""The four models of the EE-LLM paper on its 64 A100s, as the simulator knows them.

The paper gives no vocabulary and no MLP width: a vocabulary of 50,304 and Llama's widths are
assumed. Minimal exits after a quarter and after half of the layers.
"""

from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.pipeline.generators import OneFOneB
from megatron.early_exit.pipeline.simulation import Timeline, simulate
from megatron.early_exit.pipeline.simulation.hardware import ACCELERATORS
from megatron.early_exit.pipeline.simulation.layout import Layout
from megatron.early_exit.pipeline.simulation.model_costs import ExitExecution, model_costs
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape

NUM_ACCELERATORS, GLOBAL_BATCH_SIZE, NUM_RANKS = 64, 2048, 4


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """A model of the paper.

    Attributes:
        shape: its size.
        tensor_parallel: accelerators that share a layer.
        microbatch_size: sequences of a microbatch.
    """

    shape: ModelShape
    tensor_parallel: int
    microbatch_size: int

    @property
    def data_parallel(self) -> int:
        return NUM_ACCELERATORS // NUM_RANKS // self.tensor_parallel

    @property
    def num_microbatches(self) -> int:
        return GLOBAL_BATCH_SIZE // self.data_parallel // self.microbatch_size

    def layout(self, use_tp_pp_dp_mapping: bool) -> Layout:
        return Layout(
            layers_per_stage=(self.shape.num_layers // NUM_RANKS,) * NUM_RANKS,
            num_ranks=NUM_RANKS,
            tensor_parallel=self.tensor_parallel,
            data_parallel=self.data_parallel,
            microbatch_size=self.microbatch_size,
            use_tp_pp_dp_mapping=use_tp_pp_dp_mapping,
        )

    def exits(self, pre_exit: bool) -> EarlyExitConfig:
        quarter = self.shape.num_layers // 4
        return EarlyExitConfig(
            exit_layer_nums=(quarter + pre_exit, 2 * quarter + pre_exit),
            pre_exit=pre_exit,
            untie_exit_output_weights=not self.shape.tied_embedding,
        )

    def step(
        self,
        exits: EarlyExitConfig,
        execution: ExitExecution,
        use_tp_pp_dp_mapping: bool = True,
    ) -> Timeline:
        """A step of 1F1B."""
        schedule = OneFOneB(num_ranks=NUM_RANKS, num_microbatches=self.num_microbatches)
        costs = model_costs(
            self.shape,
            self.layout(use_tp_pp_dp_mapping),
            ACCELERATORS["a100-80gb"],
            exits,
            execution,
        )
        return simulate(schedule.build(), costs)


def _model(
    layers: int, hidden: int, ffn: int, heads: int, parallel: int, size: int, tied: bool
) -> PaperModel:
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=heads,
        vocab_size=50304,
        seq_length=2048,
        tied_embedding=tied,
    )
    return PaperModel(shape=shape, tensor_parallel=parallel, microbatch_size=size)


PAPER_MODELS = {
    "1.3B": _model(24, 2048, 5504, 16, 1, 4, True),
    "7B": _model(32, 4096, 11008, 32, 1, 2, False),
    "13B": _model(40, 5120, 13824, 40, 2, 1, False),
    "30B": _model(60, 6656, 17920, 52, 4, 1, False),
}
