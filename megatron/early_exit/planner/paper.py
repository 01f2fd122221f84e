"""The setting of the EE-LLM paper (arXiv 2312.04916): its models on 64 A100s in four stages."""

from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.training_options import TrainingOptions
from megatron.early_exit.planner.named_models import NAMED_MODELS, NamedModel
from megatron.early_exit.planner.simulation.long_step import StepTime, time_long_step
from megatron.early_exit.schedules.check import build_proved
from megatron.early_exit.schedules.generators import FilledOneFOneB
from megatron.early_exit.schedules.schedule import Schedule

NUM_ACCELERATORS, NUM_RANKS = 64, 4
# Replicas do not share the optimizer's states there.
_OPTIONS = TrainingOptions(distributed_optimizer=False)


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """A model of the paper, as it was trained there.

    Attributes:
        model: what is trained.
        tensor_parallel: accelerators that share a layer.
        microbatch_size: sequences of a microbatch.
    """

    model: NamedModel
    tensor_parallel: int
    microbatch_size: int

    @property
    def data_parallel(self) -> int:
        """Replicas."""
        return NUM_ACCELERATORS // NUM_RANKS // self.tensor_parallel

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step, for each replica."""
        return self.model.global_batch_size // self.data_parallel // self.microbatch_size

    def layout(self, use_tp_pp_dp_mapping: bool) -> Layout:
        """How the model is laid out over the paper's machines."""
        return Layout(
            layers_per_stage=(self.model.shape.num_layers // NUM_RANKS,) * NUM_RANKS,
            num_ranks=NUM_RANKS,
            tensor_parallel=self.tensor_parallel,
            data_parallel=self.data_parallel,
            microbatch_size=self.microbatch_size,
            use_tp_pp_dp_mapping=use_tp_pp_dp_mapping,
        )

    def step(
        self,
        exits: EarlyExitConfig,
        execution: ExitExecution,
        use_tp_pp_dp_mapping: bool = True,
        fill_bubbles: bool = False,
    ) -> StepTime:
        """The pipeline's part of a step of 1F1B, with all fills that fit or with none."""
        layout = self.layout(use_tp_pp_dp_mapping)
        costs = model_costs(
            *(self.model.shape, layout, ACCELERATORS["a100-80gb"], exits, execution),
            options=_OPTIONS,
        )

        def build(num_microbatches: int) -> Schedule:
            fills = None if fill_bubbles else 0
            generator = FilledOneFOneB(
                num_ranks=NUM_RANKS,
                num_microbatches=num_microbatches,
                backward_forward_ratio=costs.backward_forward_ratio,
                num_warmup_fills=fills,
                num_cooldown_fills=fills,
                exit_stages=frozenset(exits.stages(layout.layers_per_stage)),
            )
            return build_proved(generator)

        return time_long_step(build, self.num_microbatches, costs)


PAPER_MODELS: dict[str, PaperModel] = {
    name: PaperModel(model=NAMED_MODELS[name], tensor_parallel=parallel, microbatch_size=size)
    for name, parallel, size in (("1.3b", 1, 4), ("7b", 1, 2), ("13b", 2, 1), ("30b", 4, 1))
}
"""The paper's models by name."""
