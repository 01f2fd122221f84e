"""Numbers of weights agree with the tensors that a model is made of."""

from math import prod

import pytest

from megatron.early_exit.checkpoint.weights import LAYERS, weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.tiny_models import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_weights_of_a_layer_are_those_of_its_matrices(name):
    architecture = ARCHITECTURES[name]
    matrices = {
        tensor: prod(shape)
        for tensor, shape in weight_shapes(architecture, EarlyExitConfig()).items()
        if tensor.startswith(f"{LAYERS}0.") and len(shape) == 2
    }
    assert architecture.layer_weights == sum(matrices.values())
    mlp = [number for tensor, number in matrices.items() if ".mlp." in tensor]
    assert architecture.mlp_weights == sum(mlp)
