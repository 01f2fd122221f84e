"""What this machine is, and what is installed on it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.attention import SDPBackend

from gpu_sections.findings import SectionReport
from gpu_sections.sizes import Sizes


def check_versions(report: SectionReport, sizes: Sizes) -> None:
    """Versions, the device, and the order in which PyTorch prefers its attention backends."""
    report.measure("Python", platform.python_version())
    report.measure("PyTorch", torch.__version__)
    for package in ("megatron-core", "megatron-early-exit"):
        report.measure(package, installed(package))
    report.measure("Transformer Engine", installed("transformer-engine"))
    report.measure("CUDA that PyTorch was built with", torch.version.cuda or "none")
    report.measure("attention backends, first choice first", ", ".join(attention_order()))
    if not sizes.on_gpu:
        report.skip("driver and device", f"{platform.machine()}, {torch.get_num_threads()} threads")
        return
    properties = torch.cuda.get_device_properties(sizes.device)
    report.measure(
        "device",
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, {torch.cuda.device_count()} of them",
        total_bytes=properties.total_memory,
        count=torch.cuda.device_count(),
    )
    report.measure("driver", driver_version())
    report.measure("cuDNN", str(torch.backends.cudnn.version()))


def installed(package: str) -> str:
    """The version of a package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def attention_order() -> list[str]:
    """Names of the backends of `scaled_dot_product_attention` that are turned on, in PyTorch's
    order."""
    backends = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: backends.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: backends.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: backends.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: backends.cudnn_sdp_enabled(),
    }
    # PyTorch gives the order as numbers, which are those of the backends.
    backends_by_number = {int(one.value): one for one in enabled}
    order = [backends_by_number.get(number) for number in torch._C._get_sdp_priority_order()]
    return [one.name for one in order if one is not None and enabled[one]]


def driver_version() -> str:
    """The version of NVIDIA's driver, by its own command."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {' '.join(str(error).split())}"
    return done.stdout.splitlines()[0].strip()
