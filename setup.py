"""Builds the native extension ``gradsel_kernels._C``, and the CUDA kernels where there is an nvcc to do it.

All metadata is in pyproject.toml. Nothing here imports torch or looks for a GPU: the extension takes raw pointers and
finds the NVIDIA driver at run time, so one build serves every torch version and every machine. A failing compiler
leaves a working package without what it was to compile.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

FLAGS_GNU = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
FLAGS_MSVC = ["/O2", "/std:c++17", "/fp:strict", "/openmp"]
# No fused multiply-adds but those written out, as on the CPU. PTX serves what is newer than all of these.
FLAGS_NVCC = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "--threads", "0"]
FLAGS_NVCC += ["-allow-unsupported-compiler"]  # the host's compiler, of which only the preprocessor is used
CUDA_TARGETS = {"compute_80": "[sm_80,compute_80]", "compute_90": "sm_90", "compute_100": "sm_100"}
KERNELS = Path("csrc/cuda/kernels.cu")
#: What the CUDA kernels are made of. Kernels and extension carry its hash: they must be of the same.
CUDA_SOURCES = sorted([*KERNELS.parent.glob("*.cu*"), *KERNELS.parent.glob("*.h"), *Path("csrc").glob("*.h")])
SOURCE_HASH = hashlib.sha256(b"".join(path.read_bytes() for path in CUDA_SOURCES)).hexdigest()[:16]
FATBIN = "kernels.fatbin"  # beside gradsel_kernels/__init__.py


def find_nvcc():
    """The compiler that CUDA_HOME names, that is on the PATH, or that pip has installed; None if there is none."""
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places += [Path(place) for place in os.environ.get("PATH", "").split(os.pathsep)]
    for scheme in ("purelib", "platlib"):
        places += sorted(Path(sysconfig.get_path(scheme)).glob("nvidia/cu*/bin"), reverse=True)
    found = (shutil.which("nvcc", path=str(place)) for place in [*places, "/usr/local/cuda/bin"])
    return next(filter(None, found), None)


class BuildExtension(build_ext):
    """Adds OpenMP where the compiler has it, compiles the CUDA kernels, and says what a failed build means."""

    def run(self):
        super().run()
        in_source = self.inplace or self.editable_mode
        self.build_fatbin(Path("gradsel_kernels" if in_source else f"{self.build_lib}/gradsel_kernels") / FATBIN)

    def build_fatbin(self, fatbin):
        if fatbin.exists():
            if f"gradsel_source_{SOURCE_HASH}".encode() in fatbin.read_bytes():
                return
            fatbin.unlink()  # of other sources
        nvcc = find_nvcc()
        required = os.environ.get("GRADSEL_REQUIRE_CUDA") == "1"
        if nvcc is None:
            if required:
                raise FileNotFoundError("GRADSEL_REQUIRE_CUDA=1, but no nvcc is found; set CUDA_HOME")
            return
        try:
            known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
            targets = [f"-gencode=arch={arch},code={code}" for arch, code in CUDA_TARGETS.items() if arch in known]
            flags = [*FLAGS_NVCC, *targets, f"-DGRADSEL_SOURCE={SOURCE_HASH}"]
            fatbin.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([nvcc, "-fatbin", *flags, "-o", str(fatbin), str(KERNELS)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if required:
                raise
            print(
                f"gradsel-kernels: the CUDA kernels were not built ({error}). The package works without them, on "
                "Triton's. Set GRADSEL_REQUIRE_CUDA=1 to make this an error.",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += FLAGS_MSVC
        else:
            ext.extra_compile_args += FLAGS_GNU
            if sys.platform == "linux":
                ext.extra_compile_args += ["-fopenmp"]
                ext.extra_link_args += ["-fopenmp"]
        try:
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("GRADSEL_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"gradsel-kernels: the C++ kernels were not built ({error}). The package works without them, on the "
                "slower pure-torch backend. To get them, install a C++17 compiler and the Python headers and install "
                "again; set GRADSEL_REQUIRE_NATIVE=1 to make this an error.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self):
        # Not get_ext_fullpath(): by now that is the place in the source tree, where nothing has been copied to yet.
        built = [os.path.join(self.build_lib, self.get_ext_filename(e.name)) for e in self.extensions]
        self.extensions = [e for e, path in zip(self.extensions, built, strict=True) if os.path.exists(path)]
        super().copy_extensions_to_source()


ParallelCompile("GRADSEL_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "gradsel_kernels._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted({*map(str, CUDA_SOURCES), *(str(path) for path in Path("csrc").rglob("*.h"))}),
            define_macros=[("GRADSEL_SOURCE", f'"{SOURCE_HASH}"')],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
