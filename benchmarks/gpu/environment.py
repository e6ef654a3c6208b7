"""Where and with what something was measured, and a hash that says whether it has to be measured again."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from common import device_name

import gradsel_kernels as gk

ROOT = Path(__file__).resolve().parents[2]
#: Whatever a measured time depends on, and whatever decides about the tests besides.
MEASURED = ("setup.py", "csrc", "gradsel_kernels", "python")
TESTED = (*MEASURED, "tests/conftest.py", "tests/gpu", "tests/kernels", "tests/gradsel", "tests/cuda/build.py")
SOURCES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".inc"}
#: Columns that :func:`environment` fills.
ENVIRONMENT = ("device", "driver", "cuda", "torch", "triton", "gradsel_kernels", "source", "date", "command")


def source_hash(places: Sequence[str] = MEASURED) -> str:
    """Of names and contents; no git, because a copy of the working tree may come without it."""
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        files = path.rglob("*") if path.is_dir() else [path]
        for file in sorted(file for file in files if file.suffix in SOURCES and file.is_file()):
            digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def driver() -> str:
    """The driver's version; where nvidia-smi is missing, the newest CUDA version that it supports."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        if found:
            return found[0]
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return f"CUDA {torch._C._cuda_getDriverVersion()}"
    except (AttributeError, RuntimeError):
        return ""


def now() -> str:
    """To the second, so that lines can be told from those of the run before."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def environment(device: torch.device, command: Sequence[str]) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device_name(),
        "driver": driver() if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton,
        "gradsel_kernels": gk.__version__,
        "source": source_hash(),
        "date": now(),
        "command": shlex.join(["python", "benchmarks/gpu", *command]),
    }
