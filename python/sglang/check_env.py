"""``python -m sglang.check_env``: what a bug report needs to know of this machine, one ``key: value`` a line."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from sglang.version import __version__

PACKAGES = (
    "torch", "triton", "aiter", "mori", "transformers", "tokenizers", "safetensors", "numpy", "starlette",
    "uvicorn", "msgspec", "pyzmq", "jinja2", "httpx", "openai", "sglang-router",
)  # fmt: skip
VARIABLES = ("GPU_MAX_HW_QUEUES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def command_output(*command: str) -> str:
    """Output of a command, or why there is none."""
    if shutil.which(command[0]) is None:
        return "Not Available"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Not Available ({type(error).__name__})"
    return result.stdout.strip() or "Not Available"


def vendor_fakes() -> tuple[str, ...]:
    """Packages that Python would take from this project's fakes."""
    try:
        from sglang.srt.platforms.rocm import find_fakes
    except Exception:  # a broken torch, of which its own line says more
        return ()
    return find_fakes()


def package_version(name: str) -> str:
    if name in vendor_fakes():
        return "FAKE of this project, on PYTHONPATH"
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version" if importlib.util.find_spec(name.replace("-", "_")) else "Module Not Found"


def torch_lines() -> Iterator[tuple[str, str]]:
    """GPUs and the ROCm or CUDA that torch was built for."""
    try:
        import torch
    except Exception as error:  # a broken installation is what such a report is for
        yield "PyTorch", f"cannot be imported: {error}"
        return
    available = torch.cuda.is_available()
    hip = getattr(torch.version, "hip", None)
    yield "PyTorch", torch.__version__
    yield "ROCM available", str(bool(available and hip))
    yield "CUDA available", str(bool(available and not hip))
    yield "HIP version of torch", str(hip)
    for index in range(torch.cuda.device_count() if available else 0):
        properties = torch.cuda.get_device_properties(index)
        arch = getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}")
        yield f"GPU {index}", f"{properties.name}, {arch}, {properties.total_memory / 2**30:.1f} GiB"


def report() -> Iterator[tuple[str, str]]:
    """All lines, in order."""
    yield "sglang-amd", __version__
    yield "Python", sys.version.replace("\n", " ")
    yield "Platform", platform.platform()
    yield "CPU cores", str(os.cpu_count())
    yield from torch_lines()
    yield "ROCM_HOME", os.environ.get("ROCM_HOME", "/opt/rocm" if os.path.isdir("/opt/rocm") else "Not set")
    yield "HIPCC", command_output("hipcc", "--version").splitlines()[0]
    yield "ROCm driver version", command_output("rocm-smi", "--showdriverversion")
    yield "AMD topology", command_output("rocm-smi", "--showtopotype")
    for name in VARIABLES:
        yield name, os.environ.get(name, "Not set")
    for name in PACKAGES:
        yield name, package_version(name)
    yield "Hypervisor", command_output("systemd-detect-virt")
    yield "ulimit soft", str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def main() -> int:
    """Print the report."""
    for key, value in report():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
