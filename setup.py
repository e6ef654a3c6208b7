"""Builds the native extension ``gradsel_kernels._C``, and the CUDA kernels where nvcc is found.

All metadata is in pyproject.toml. Nothing here imports torch or looks for a GPU: the extension takes raw pointers and
finds the NVIDIA driver at run time, so one build serves every torch version and every machine. If a compiler is missing
or fails, the package still installs, without what it would have compiled.

Both compilers run in one ninja graph, whose object files and log stay in ``build/``: after a change, whichever command
builds the package next (pip or setup.py) compiles only what includes the changed file.
"""

import contextlib
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS_GNU = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
FLAGS_GNU += ["-fvisibility=hidden", *([] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"])]
FLAGS_MSVC = ["/O2", "/std:c++17", "/fp:strict", "/openmp", "/EHsc", "/bigobj"]
# As on the CPU, multiply-adds are fused only where the source says so. PTX serves GPUs newer than all of these.
FLAGS_NVCC = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "--threads", "0"]
FLAGS_NVCC += ["-allow-unsupported-compiler"]  # only the host compiler's preprocessor is used
CUDA_TARGETS = {"compute_80": "[sm_80,compute_80]", "compute_90": "sm_90", "compute_100": "sm_100"}

SOURCES = Path("csrc")
KERNELS = SOURCES / "cuda" / "kernels.cu"
BINDINGS = [SOURCES / "bindings.cpp", SOURCES / "cuda" / "bindings.cpp", *sorted((SOURCES / "python").glob("*.cpp"))]
DRIVER = SOURCES / "cuda" / "driver.cpp"
#: What the CUDA kernels are made of. Fatbin and extension carry its hash, so that no stale fatbin is ever loaded.
CUDA_SOURCES = sorted([*KERNELS.parent.glob("*.cu*"), *KERNELS.parent.glob("*.h"), *(SOURCES / "common").glob("*.h")])
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


class Graph:
    """Commands and the files that they make. ninja runs those whose inputs, headers or command line have changed."""

    def __init__(self, folder):
        self.file = folder / "build.ninja"
        self.text = io.StringIO()
        self.writer = ninja_syntax.Writer(self.text)
        self.writer.variable("builddir", str(folder))  # for ninja's own log
        self.writer.rule("compile", "$run", description="compile $in", depfile="$out.d", deps="gcc")
        self.writer.rule("compile_msvc", "$run", description="compile $in", deps="msvc")
        self.writer.rule("link", "$run", description="link $out")

    def add(self, rule, output, inputs, command):
        if rule == "compile":  # asks the compiler to list the headers
            command = [*command, "-MD", "-MF", f"{output}.d"]
        elif rule == "compile_msvc":
            command = [*command, "/showIncludes"]
        line = subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
        self.writer.build(str(output), rule, [*map(str, inputs)], variables={"run": ninja_syntax.escape(line)})

    def build(self, outputs, environment):
        """Whether all of them could be made."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(self.text.getvalue())
        jobs = int(os.environ.get("GRADSEL_BUILD_JOBS", "2"))
        options = ["-j", str(jobs)] if jobs > 0 else []  # otherwise ninja counts the processors
        command = [sys.executable, "-m", "ninja", "-f", str(self.file), *options, *map(str, outputs)]
        sys.stdout.flush()
        return subprocess.run(command, env=environment, check=False).returncode == 0


@contextlib.contextmanager
def optional(what, consequence, variable):
    """Reports an error instead of raising it, unless the environment variable requires ``what``."""
    try:
        yield
    except Exception as error:
        if os.environ.get(variable) == "1":
            raise
        print(
            f"gradsel-kernels: {what} were not built ({error}). The package works without them, {consequence} Set "
            f"{variable}=1 to make this an error.",
            file=sys.stderr,
        )


def optional_extension():
    remedy = "To get them, install a C++17 compiler and the Python headers and install again."
    return optional("the C++ kernels", f"on the slower pure-torch backend. {remedy}", "GRADSEL_REQUIRE_NATIVE")


def optional_fatbin():
    return optional("the CUDA kernels", "on Triton's.", "GRADSEL_REQUIRE_CUDA")


class BuildExtension(build_ext):
    """setuptools finds the compiler and Python's flags as for any extension, but ninja runs the commands."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # setuptools leaves nothing out: what is up to date is for ninja to say
        if self.editable_mode:  # pip's folder is temporary
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        package = "gradsel_kernels" if self.inplace else f"{self.build_lib}/gradsel_kernels"
        self.fatbin = Path(package) / FATBIN

    def build_extension(self, ext):
        graph = Graph(Path(self.build_temp))
        copies = {}  # from what ninja makes to where it belongs
        module = fatbin = None
        with optional_extension():
            module = self.add_extension(graph, ext)
            copies[module] = Path(self.get_ext_fullpath(ext.name))
        with optional_fatbin():
            fatbin = self.add_fatbin(graph)
            copies[fatbin] = self.fatbin
        copies.pop(None, None)

        environment = {**os.environ, "PATH": getattr(self.compiler, "_paths", os.environ.get("PATH", ""))}  # MSVC's
        all_built = bool(copies) and graph.build(copies, environment)
        for output, part in ((module, optional_extension), (fatbin, optional_fatbin)):
            if output is None:
                continue
            with part():
                if not all_built and not graph.build([output], environment):
                    raise RuntimeError("the messages of the compiler are above; with pip, use --verbose")
                self.mkpath(str(copies[output].parent))
                self.copy_file(str(output), str(copies[output]))

    def add_extension(self, graph, ext):
        msvc = self.compiler.compiler_type == "msvc"
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        commands = []
        # Its own methods call one of these, depending on the version of setuptools.
        self.compiler.spawn = self.compiler.call = lambda command, **_: commands.append(list(map(str, command)))

        # pip's build isolation moves pybind11 at every build, and a change of CUDA sources changes the hash: neither
        # is in the command line of sources that do not need it.
        kernels = sorted({Path(source) for source in ext.sources} - {*BINDINGS, DRIVER})
        objects = []
        for sources, includes, macros in (
            (kernels, [], []),
            (BINDINGS, [pybind11.get_include()], []),
            ([DRIVER], [], [("GRADSEL_SOURCE", f'"{SOURCE_HASH}"')]),
        ):
            commands.clear()
            made = self.compiler.compile(
                [str(source) for source in sources],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=[str(SOURCES), *includes],
                extra_postargs=FLAGS_MSVC if msvc else [*FLAGS_GNU, *openmp],
            )
            for source, output, command in zip(sources, made, commands, strict=True):
                graph.add("compile_msvc" if msvc else "compile", output, [source], command)
            objects += made

        module = Path(self.build_temp) / self.get_ext_filename(ext.name)
        commands.clear()
        self.compiler.link_shared_object(
            objects,
            str(module),
            libraries=self.get_libraries(ext),
            extra_postargs=openmp,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )
        (command,) = commands
        graph.add("link", module, objects, command)
        return module

    def add_fatbin(self, graph):
        """None if there is nothing to do, or nothing to do it with."""
        if self.fatbin.exists():
            if f"gradsel_source_{SOURCE_HASH}".encode() in self.fatbin.read_bytes():
                return None
            self.fatbin.unlink()  # of other sources
        nvcc = find_nvcc()
        if nvcc is None:
            if os.environ.get("GRADSEL_REQUIRE_CUDA") == "1":
                raise FileNotFoundError("GRADSEL_REQUIRE_CUDA=1, but no nvcc is found; set CUDA_HOME")
            return None
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        targets = [f"-gencode=arch={arch},code={code}" for arch, code in CUDA_TARGETS.items() if arch in known]
        flags = [*FLAGS_NVCC, *targets, f"-I{SOURCES}", f"-DGRADSEL_SOURCE={SOURCE_HASH}"]
        output = Path(self.build_temp) / FATBIN
        graph.add("compile", output, [KERNELS], [nvcc, "-fatbin", *flags, "-o", str(output), str(KERNELS)])
        return output

    def copy_extensions_to_source(self):
        # Not get_ext_fullpath(): by now that is the place in the source tree, where nothing has been copied to yet.
        built = [os.path.join(self.build_lib, self.get_ext_filename(e.name)) for e in self.extensions]
        self.extensions = [e for e, path in zip(self.extensions, built, strict=True) if os.path.exists(path)]
        super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("gradsel_kernels._C", sorted(str(path) for path in SOURCES.rglob("*.cpp")), language="c++")],
    cmdclass={"build_ext": BuildExtension},
)
