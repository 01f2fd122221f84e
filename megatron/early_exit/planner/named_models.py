"""Models that are known by name: those of the papers, one of 175 billion weights, and a mixture.

The EE-LLM paper (arXiv 2312.04916) gives no vocabulary and no MLP width: a vocabulary of 50,304 and
Llama's widths are assumed, and exits after a quarter and after half of the layers. The largest is
GPT-3's shape and batch (arXiv 2005.14165) with a gated MLP of as many weights. The mixture of
experts has the sizes of Qwen3-235B-A22B (arXiv 2505.09388).
"""

from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.experts import Experts
from megatron.early_exit.planner.costs.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model and how it is trained.

    Attributes:
        shape: its size.
        exits: minimal ones after their layers, tied where the final head is.
        global_batch_size: sequences of a step.
    """

    shape: ModelShape
    exits: EarlyExitConfig
    global_batch_size: int


def _model(
    layers: int, hidden: int, ffn: int, heads: int, *, tied: bool = False, batch: int = 2048
) -> NamedModel:
    shape = ModelShape.llama(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=heads,
        vocab_size=50304,
        seq_length=2048,
        share_embeddings_and_output_weights=tied,
    )
    exits = EarlyExitConfig(
        exit_layer_nums=(layers // 4, layers // 2), untie_exit_output_weights=not tied
    )
    return NamedModel(shape=shape, exits=exits, global_batch_size=batch)


NAMED_MODELS: dict[str, NamedModel] = {
    "1.3b": _model(24, 2048, 5504, 32, tied=True),
    "7b": _model(32, 4096, 11008, 32),
    "13b": _model(40, 5120, 13824, 40),
    "30b": _model(60, 6656, 17920, 52),
    "175b": _model(96, 12288, 32768, 96, batch=1536),
    "qwen3-235b-a22b": NamedModel(
        shape=ModelShape.llama(
            num_layers=94,
            hidden_size=4096,
            ffn_hidden_size=12288,
            num_attention_heads=64,
            num_query_groups=4,
            kv_channels=128,
            vocab_size=151936,
            seq_length=4096,
            experts=Experts(num_experts=128, moe_router_topk=8, moe_ffn_hidden_size=1536),
        ),
        exits=EarlyExitConfig(exit_layer_nums=(23, 47), untie_exit_output_weights=True),
        global_batch_size=2048,
    ),
}
"""Models by name."""
