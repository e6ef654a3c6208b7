"""Builds the native extension ``gradsel_kernels._C``; all metadata is in pyproject.toml.

Nothing here imports torch or looks for a GPU: the extension takes raw pointers, so one build serves every
torch version. A failing compiler leaves a working package without the extension.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

FLAGS_GNU = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
FLAGS_MSVC = ["/O2", "/std:c++17", "/fp:strict", "/openmp"]


class BuildExtension(build_ext):
    """Adds OpenMP where the compiler has it, and says what a failed build means."""

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
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
