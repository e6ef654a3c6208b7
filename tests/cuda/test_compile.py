"""The CUDA C++ kernels as nvcc compiled them: nothing spills, registers fit, and streams load 16 bytes at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gradsel_kernels.backends.cuda import FATBIN

NAMES = re.findall(r"X\((gradsel_\w+)\)", (Path(__file__).parents[2] / "csrc" / "cuda" / "kernel_names.h").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100")
#: A multiprocessor has 65,536 registers; what the blocks of a kernel leave of them is what hides latency.
REGISTERS = {
    r"topk_one_.*": 72,
    r"topk_few_(16|32)": 80,
    r"topk_few_64": 96,
    r"topk_many_.*": 64,
    r"topk_adam_one_.*": 80,
    r"topk_adam_few_(16|32)": 80,
    r"topk_adam_few_64": 96,
    r"topk_adam_many_.*": 80,
    r"adam_step_32": 170,
    r"adam_step_64": 255,
    r"write_table": 40,
}
#: Bytes that are put aside, by exception: a third block on a multiprocessor is worth two registers.
STACK = {("sm_100", "gradsel_adam_step_32"): 8}


def cuobjdump(*options: str) -> str:
    triton = pytest.importorskip("triton", reason="Triton is not installed, whose cuobjdump this needs")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, *options, FATBIN], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def built():
    if not FATBIN.exists():
        pytest.skip(
            f"{FATBIN.name} is not there: setup.py found no nvcc when it built this package"
            + " (there is one now: build again)" * (shutil.which("nvcc") is not None)
        )


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """By architecture and kernel."""
    found = {}
    target = ""
    function = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            target = match[1]
        elif match := re.search(r"Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            found[target, function] = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills_and_registers_fit(resources, name, target):
    used = resources[target, name]
    assert used["STACK"] <= STACK.get((target, name), 0)
    assert used["LOCAL"] == 0
    (most,) = (limit for pattern, limit in REGISTERS.items() if re.fullmatch(pattern, name.removeprefix("gradsel_")))
    assert used["REG"] <= most


def test_every_kernel_is_there(resources):
    found = {(target, name) for target, name in resources if not name.startswith("gradsel_source_")}
    assert found == {(target, name) for target in TARGETS for name in NAMES}


def test_there_is_code_for_later_architectures():
    assert "compute_80" in cuobjdump("-lptx") or "sm_80.ptx" in cuobjdump("-lptx")


@pytest.mark.parametrize("name", [name for name in NAMES if re.search("_one_|_few_|adam_step", name)])
def test_streams_are_read_and_written_in_vectors(name):
    code = cuobjdump("-sass", "-arch", "sm_90", "-fun", name)
    assert re.search(r"LDG\.E(\.\w+)*\.128", code)
    assert "adam_step" not in name or re.search(r"STG\.E(\.\w+)*\.128", code)


def test_no_access_asks_which_memory_it_is_in():
    """Addresses from a table are known to be in global memory: a generic access would test for shared memory first."""
    names = [name for name in NAMES if "topk_adam" in name]
    code = cuobjdump("-sass", "-arch", "sm_90", "-fun", ",".join(names))
    assert code.count("Function :") == len(names)
    assert re.search(r"\bLDG\.", code)
    assert not re.search(r"\b(LD|ST)\.", code)


def test_a_steps_loads_do_not_wait_for_each_other():
    """Parameter, gradient and two moments: four loads in a row, nothing between them that needs the first."""
    code = cuobjdump("-sass", "-arch", "sm_90", "-fun", "gradsel_adam_step_32")
    lines = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", code)
    assert any(all("LDG.E.128" in line for line in lines[i : i + 4]) for i in range(len(lines) - 3))


def test_products_and_sums_are_not_fused_but_where_written():
    """Adam's arithmetic rounds where the specification does: without .rn the assembler may make one out of two."""
    code = cuobjdump("-ptx")
    assert re.search(r"\bmul\.rn\.f32\b", code)
    assert not re.search(r"\b(add|sub|mul)(\.ftz)?\.f(32|64)\b", code)
    assert ".ftz" not in code
