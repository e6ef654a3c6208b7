"""setup.py: what it compiles again after a change, and what it does where a compiler is missing or fails.

The compilers are stand-ins: the C++ compiler only preprocesses, which takes a second and lists the same headers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.build import compiler

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("ninja", "pybind11", "setuptools") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"building needs {', '.join(MISSING)}, which is not installed"),
    pytest.mark.skipif(os.name == "nt", reason="the stand-ins for compilers are shell scripts"),
]

#: Preprocesses instead of compiling; links by making an empty file.
PREPROCESS = """#!/bin/sh
compiles=
for argument; do
  shift
  case "$argument" in
    -c) compiles=1; set -- "$@" -E ;;
    *) set -- "$@" "$argument" ;;
  esac
  [ "$previous" != -o ] || output="$argument"
  previous="$argument"
done
if [ "$compiles" ]; then exec {compiler} "$@"; fi
: > "$output"
"""
#: Knows one architecture, and leaves the name of the sources in the fatbin as nvcc does.
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_80; exit; fi
for argument; do
  case "$argument" in -DGRADSEL_SOURCE=*) source="${argument#*=}" ;; esac
  [ "$previous" != -o ] || output="$argument"
  previous="$argument"
done
echo "gradsel_source_$source" > "$output"
echo "$output: csrc/cuda/kernels.cu csrc/common/adam_math.h" > "$output.d"
"""
#: Runs setup.py with one nvcc or none, whatever the machine has on its PATH, in /usr/local or among pip's packages.
SETUP = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, **where: {nvcc!r} if name == "nvcc" else which(name, **where)
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


class Tree:
    """A copy of the sources, and builds of it with stand-ins for compilers."""

    def __init__(self, folder: Path):
        self.root = folder / "tree"
        self.bin = folder / "bin"
        self.bin.mkdir()
        ignored = shutil.ignore_patterns("*.so", "*.fatbin", "__pycache__")
        for name in ("csrc", "gradsel_kernels", "python"):
            shutil.copytree(ROOT / name, self.root / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root / name)

    def program(self, name: str, script: str) -> str:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)
        return str(path)

    def build(self, cxx: str, nvcc: str = "", fails: bool = False, **environment: str) -> str:
        """What was printed. Without ``nvcc`` none is found."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        environment = {**kept, "PATH": "/usr/bin:/bin", "CC": cxx, "CXX": cxx, **environment}
        command = [sys.executable, "-c", SETUP.format(nvcc=nvcc or None)]
        run = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        printed = run.stdout + run.stderr
        assert (run.returncode != 0) == fails, printed
        return printed

    def change(self, path: str) -> None:
        file = self.root / path
        file.write_text(file.read_text() + "// changed\n")

    def built(self) -> set[str]:
        """The names of the extension and the fatbin, if they are in the package."""
        folder = self.root / "gradsel_kernels"
        return {path.name.split(".")[0] for path in [*folder.glob("*.so"), *folder.glob("*.fatbin")]}


def compiled(printed: str) -> set[str]:
    return set(re.findall(r"\] compile (\S+)", printed))


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def cxx(tree):
    command = compiler()
    if command is None:
        pytest.skip("there is no C++ compiler")
    return tree.program("c++", PREPROCESS.format(compiler=shlex.join(command)))


def test_a_changed_header_rebuilds_what_includes_it(tree, cxx):
    sources = {str(path.relative_to(tree.root)) for path in tree.root.glob("csrc/**/*.cpp")}
    assert compiled(tree.build(cxx)) == sources
    assert compiled(tree.build(cxx)) == set()

    for header in ("registers.h", "select_rows.inc"):
        tree.change(f"csrc/cpu/topk/{header}")
        assert compiled(tree.build(cxx)) == {"csrc/cpu/topk/topk.cpp"}
    tree.change("csrc/cpu/topk/topk.h")
    assert compiled(tree.build(cxx)) == {
        "csrc/cpu/topk/topk.cpp",
        "csrc/cpu/topk_adam/topk_adam.cpp",
        "csrc/bindings.cpp",
    }
    tree.change("csrc/cpu/adam/runs.h")
    assert compiled(tree.build(cxx)) == {
        *(f"csrc/cpu/adam/{name}.cpp" for name in ("adam", "runs")),
        "csrc/cpu/topk_adam/topk_adam.cpp",
    }
    # What the GPU's kernels are made of has another hash now, which the driver has to know.
    tree.change("csrc/cuda/device.cuh")
    assert compiled(tree.build(cxx)) == {"csrc/cuda/driver.cpp"}


def test_the_fatbin_is_built_for_other_sources_only(tree, cxx):
    nvcc = tree.program("nvcc", NVCC)
    assert "csrc/cuda/kernels.cu" in compiled(tree.build(cxx, nvcc))
    assert tree.built() == {"_C", "kernels"}
    assert compiled(tree.build(cxx, nvcc)) == set()
    tree.change("csrc/common/adam_math.h")
    again = compiled(tree.build(cxx, nvcc))
    assert {"csrc/cuda/kernels.cu", "csrc/cpu/adam/runs.cpp", "csrc/cuda/driver.cpp"} <= again
    assert "csrc/cpu/topk/topk.cpp" not in again
    tree.change("csrc/common/adam_math.h")
    tree.build(cxx)
    assert tree.built() == {"_C"}, "a fatbin of other sources was left"


def test_without_a_compiler_one_warning_is_printed(tree):
    printed = tree.build("/bin/false")
    assert printed.count("the C++ kernels were not built") == 1
    assert "install a C++17 compiler" in printed
    assert tree.built() == set()
    assert "the C++ kernels were not built" not in tree.build("/bin/false", fails=True, GRADSEL_REQUIRE_NATIVE="1")


def test_each_compiler_may_fail_without_the_other(tree, cxx):
    nvcc, broken = tree.program("nvcc", NVCC), tree.program("broken", "#!/bin/sh\nexit 1\n")
    printed = tree.build("/bin/false", nvcc)
    assert "the C++ kernels were not built" in printed
    assert "CUDA" not in printed
    assert tree.built() == {"kernels"}

    tree.change("csrc/common/numbers.h")
    printed = tree.build(cxx, broken)
    assert "the CUDA kernels were not built" in printed
    assert "C++" not in printed
    assert tree.built() == {"_C"}
    tree.build(cxx, broken, fails=True, GRADSEL_REQUIRE_CUDA="1")
    assert "set CUDA_HOME" in tree.build(cxx, fails=True, GRADSEL_REQUIRE_CUDA="1")
