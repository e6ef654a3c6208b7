"""Compiles CUDA kernels for the CPU, with the emulator, into a Python module.

Modules are kept in build/emulated/, under a hash of all that goes into them.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc"
CUDA = SOURCES / "cuda"
NAME = "gradsel_emulated"
# As in setup.py, except for -O2.
FLAGS = (
    "-O2 -g1 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra"
)
# nvcc lets pointers of different types alias.
KERNEL_FLAGS = "-fno-strict-aliasing -Wno-unknown-pragmas -fno-sanitize-recover=all -fsanitize="
KERNEL_FLAGS += "alignment,bounds,shift-exponent,integer-divide-by-zero,float-cast-overflow"


def compiler() -> list[str] | None:
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    return None


def why_not() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if sys.platform != "linux":
        return "kernels are emulated on Linux only"
    return None if compiler() else "there is no g++ to compile the emulated kernels with"


def build(kernels: Path, names: Path, sources: Sequence[Path] = ()) -> ModuleType:
    """The module of the kernels in one file, which another file lists as GRADSEL_CUDA_KERNELS(X).

    ``sources``: C++ files for the host, of which one defines bind_cuda().
    """
    import pybind11

    cxx = compiler()
    assert cxx is not None
    includes = [f"-I{folder}" for folder in (HERE, SOURCES)]
    includes += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags = {source: [] for source in (HERE / "module.cpp", HERE / "emulator.cpp", *sources)}
    flags[HERE / "registry.cpp"] = [
        *KERNEL_FLAGS.split(),
        *("-include", str(HERE / "emulation.h")),
        *(f'-DGRADSEL_KERNELS="{kernels}"', f'-DGRADSEL_KERNEL_NAMES="{names}"'),
    ]
    common = [*cxx, *FLAGS.split(), *includes]

    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, sys.version, pybind11.__version__, common, list(flags.items()))).encode())
    folders = {kernels.parent, names.parent, HERE, CUDA, SOURCES / "common"}
    headers = {path for folder in folders for path in folder.glob("*") if path.suffix in (".h", ".cuh", ".cu")}
    for path in sorted({*headers, *flags}):
        digest.update(f"\n{path}\n".encode() + path.read_bytes())
    module = ROOT / "build" / "emulated" / digest.hexdigest()[:16] / f"{NAME}.so"

    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that another process can do the same; the last to finish leaves its module.
        with tempfile.TemporaryDirectory(dir=module.parent) as folder, ThreadPoolExecutor() as pool:
            objects = [f"{folder}/{number}.o" for number in range(len(flags))]
            compilations = [
                pool.submit(_run, [*common, *extra, "-c", str(source), "-o", object_])
                for (source, extra), object_ in zip(flags.items(), objects, strict=True)
            ]
            for compilation in compilations:
                compilation.result()
            _run([*cxx, "-shared", *objects, "-o", f"{folder}/{NAME}.so"])
            os.replace(f"{folder}/{NAME}.so", module)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(module))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    if loaded.__file__ != str(module):  # Python finds extension modules by their name alone
        raise RuntimeError(f"a process can load one emulated module, and has {loaded.__file__}")
    return loaded


def build_product() -> ModuleType:
    """The module of the kernels in csrc/cuda/ and of their host functions, with the emulator in place of driver.cpp."""
    return build(CUDA / "kernels.cu", CUDA / "kernel_names.h", [CUDA / "bindings.cpp"])


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{run.stderr[-8000:]}")
