"""Every Triton kernel compiled without a GPU: nothing spills, registers fit, streams load 16 bytes at a time."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.triton_compile.cases import CASES, CUOBJDUMP, REGISTERS, REGISTERS_A_THREAD, Case, jit_functions


@dataclass
class Code:
    ptx: str
    sass: str
    registers: int
    stack: int
    local: int

    @property
    def vector_loads(self) -> int:
        return len(re.findall(r"LDG(?:STS)?\.E\.(?:\w+\.)*128\b", self.sass))


def compiled(case: Case, target: int, path: Path) -> Code:
    names = case.kernel.arg_names
    missing = set(names) - set(case.types) - set(case.constants)
    assert not missing, f"{case.kernel.__name__} has arguments that its row does not name: {missing}"
    for parameter in case.kernel.params:  # a launch passes Python's floats in single precision unless told otherwise
        assert (case.types.get(parameter.name) == "fp64") == (parameter.annotation_type == "fp64")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.options)
    cubin = path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])

    def dump(what: str) -> str:
        done = subprocess.run([str(CUOBJDUMP), what, str(cubin)], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    usage = dump("-res-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Code(binary.asm["ptx"], dump("-sass"), registers, stack, local)


@pytest.mark.parametrize(
    ("case", "target"),
    [pytest.param(case, target, id=case.id(target)) for case in CASES for target in case.targets],
)
def test_machine_code(case, target, tmp_path):
    code = compiled(case, target, tmp_path)
    assert (code.stack, code.local) == (0, 0), f"spills: {code.registers} registers do not suffice"
    assert not re.search(r"\b(STL|LDL)\b", code.sass)
    threads = max(case.threads, 32 * case.options["num_warps"])
    assert code.registers <= min(REGISTERS_A_THREAD, REGISTERS // threads)
    if case.vectors:
        assert code.vector_loads, "a stream that is not read 16 bytes at a time"
    assert re.search(case.required, code.sass), "not on the matrix units"
    for word in case.forbidden:
        assert not re.search(rf"\.{word}\b|\b{word}\b", code.ptx), f"{word} in the PTX changes how results are rounded"


def test_every_kernel_that_is_launched_has_a_row():
    """A kernel is launched as ``kernel[grid](...)``; functions called by other device code need no row of their own."""
    functions = jit_functions()
    called = set()
    for function in functions.values():
        called |= set(function.fn.__code__.co_names)  # the globals it uses
    kernels = {name for name in functions if name.rpartition(".")[2] not in called}
    rows = {f"{case.kernel.__module__}.{case.kernel.__name__}" for case in CASES}
    assert kernels <= rows <= set(functions)
