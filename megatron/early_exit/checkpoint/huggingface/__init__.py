"""Import and export of models of Hugging Face's Llama family, with one table of names for both.

`import_hf` opens one as a `Conversion`, which writes a checkpoint of ours; `export_hf` writes a
folder for transformers.
"""

from megatron.early_exit.checkpoint.huggingface.exporting import Export, export_hf, open_export
from megatron.early_exit.checkpoint.huggingface.importing import import_hf

__all__ = ["Export", "export_hf", "import_hf", "open_export"]
