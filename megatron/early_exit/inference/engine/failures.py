"""An exception in a loop: what those are told who have to end, and whether the loop can go on."""

import traceback

import torch

OUT_OF_MEMORY = "the engine has run out of memory"
_SIGNS_OF_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work, or the same at another time, would have gone well."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # A CPU's allocator and some of CUDA's libraries raise what they raise for everything.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """A sentence for the one whose request has ended; what an exception says is for the log."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"there was an exception in the engine ({type(error).__name__})"


def release(error: BaseException, device: torch.device) -> None:
    """Let go of the memory that the frames of an exception hold, so that others can have it."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda" and is_out_of_memory(error):
        torch.cuda.empty_cache()


def is_usable(device: torch.device) -> bool:
    """Whether a device still computes: after an illegal access CUDA refuses everything for good."""
    if device.type == "cpu":
        return True
    try:
        return bool(torch.ones(1, device=device).add_(1).item() == 2)
    except RuntimeError as error:
        return is_out_of_memory(error)
