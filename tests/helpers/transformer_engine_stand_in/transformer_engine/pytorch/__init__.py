"""The modules that Megatron's layers are made of."""

from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch import fp8 as fp8
from transformer_engine.pytorch.fp8 import fp8_autocast as fp8_autocast
from transformer_engine.pytorch.fp8 import fp8_model_init as fp8_model_init
from transformer_engine.pytorch.modules import DotProductAttention as DotProductAttention
from transformer_engine.pytorch.modules import GroupedLinear as GroupedLinear
from transformer_engine.pytorch.modules import LayerNorm as LayerNorm
from transformer_engine.pytorch.modules import LayerNormLinear as LayerNormLinear
from transformer_engine.pytorch.modules import Linear as Linear
from transformer_engine.pytorch.modules import RMSNorm as RMSNorm
