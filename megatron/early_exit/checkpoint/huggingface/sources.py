"""Where a model in Hugging Face's format comes from: a folder, a GGUF file, or the hub."""

from pathlib import Path

from megatron.early_exit.checkpoint.huggingface_config import CONFIG_NAME

_GGUF = ".gguf"
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt")
_OTHER_FILES = ("consolidated*", "original/*")
"""The same weights once more, in the format of the model's makers."""


def locate_source(source: str | Path) -> Path:
    """The folder or the GGUF file that `source` means; a model on the hub is downloaded.

    Args:
        source: a folder with config.json and safetensors files, or with one GGUF file; a GGUF
            file; or, where there is no such path, the name of a model on the hub.

    Raises:
        ValueError: there is none of these, or the download fails.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != _GGUF:
            raise ValueError(f"{path} is a file, allowed: a folder with {CONFIG_NAME}, or *{_GGUF}")
        return path.resolve()
    if not path.exists():
        path = _download(str(source))
    if (path / CONFIG_NAME).is_file():
        return path
    files = sorted(path.glob(f"*{_GGUF}"))
    if len(files) == 1:
        return files[0].resolve()
    raise ValueError(
        f"{path}: holds no {CONFIG_NAME} and {len(files)} files *{_GGUF}, allowed: one of these"
    )


def _download(name: str) -> Path:
    missing = f"{name}: there is no such folder or file"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ValueError(f"{missing}, and the hub needs the huggingface_hub package") from error
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=list(_OTHER_FILES))
        )
    except HFValidationError as error:
        raise ValueError(f"{missing}, and it is not a name on the hub") from error
    # Errors of the hub and of its connection share nothing but this.
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{missing}, and it cannot be had from the hub: {reason}") from error
