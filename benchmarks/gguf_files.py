"""The weights in a GGUF file, for this project, and for llama.cpp in another format."""

from pathlib import Path
from typing import Any

import numpy as np
from decode_models import Weights
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from megatron.early_exit.checkpoint.huggingface import import_hf

_WRITTEN_ANEW = ("general.architecture", "general.file_type", "general.quantization_version")
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def read_weights(path: Path) -> Weights:
    """The model in a file, in fp32."""
    conversion = import_hf(str(path))
    architecture = conversion.description.architecture
    assert architecture is not None
    tensors = {name: lazy.read().float() for name, lazy in conversion.weights.items()}
    return Weights(architecture, conversion.description.early_exit, tensors)


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """Write the model of a file with its matrices in another format, F32, F16, BF16 or Q8_0.

    Everything else, such as norms and the tokenizer, stays as it is.
    """
    reader = GGUFReader(source)
    fields = reader.fields
    writer = GGUFWriter(target, fields["general.architecture"].contents())
    for name, field in fields.items():
        if name.startswith("GGUF.") or name in _WRITTEN_ANEW:
            continue
        kinds = field.types
        inner = kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kinds[0], inner)
    writer.add_file_type(_FILE_TYPES[kind])
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        numbers: Any = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        numbers = numbers.astype(np.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(tensor.name, numbers)
        else:
            wanted = GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, quantize(numbers, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
