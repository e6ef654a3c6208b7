"""csrc/cuda/driver.cpp against a stand-in for the NVIDIA driver: what is asked of it, and what is said if it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsel_kernels.backends import native
from tests.cuda.build import compiler, why_not

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}"),
    pytest.mark.skipif(native.broken is not None, reason=f"{native.broken}"),
]
LOADED = "import gradsel_kernels._C as C; C.cuda_load(b'fatbin'); "
TOPK = "C.cuda_topk_rows(0xabc0, 0, 100, 768, 768, 1, {k}, 0x1000, 0, {device}, {stream})"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a libcuda.so.1 each: a whole one, and one that lacks a function."""
    made = {}
    for name, flags in {"whole": [], "lacking": ["-DWITHOUT_ERROR_STRINGS"]}.items():
        made[name] = tmp_path_factory.mktemp(name)
        source = Path(__file__).with_name("fake_driver.cpp")
        command = [*compiler(), "-std=c++17", "-shared", "-fPIC", *flags, str(source)]
        subprocess.run([*command, "-o", str(made[name] / "libcuda.so.1")], check=True)
    return made


@pytest.fixture
def run(folders, tmp_path):
    """Runs code in a process with the stand-in; what it printed, and what the driver was asked for."""

    def run(code: str, driver: str = "whole", **settings: int) -> tuple[str, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        environment = {
            **os.environ, "LD_LIBRARY_PATH": str(folders[driver]), "FAKE_LOG": str(log), "PYTHONPATH": str(ROOT),
            **{f"FAKE_{name}": str(value) for name, value in settings.items()},
        }  # fmt: skip
        # Not through the package, which would import torch, and with it perhaps the driver that is there.
        code = f"import sys, types; sys.modules['gradsel_kernels'] = p = types.ModuleType('gradsel_kernels'); \
p.__path__ = [{str(ROOT / 'gradsel_kernels')!r}]; {code}"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip(), log.read_text().splitlines()

    return run


def test_a_launch(run):
    """Each kernel once to each device, in the device's own context, and with the stream, sizes and parameters given."""
    launches = "; ".join(TOPK.format(k=k, device=d, stream=s) for k, d, s in ((1, 0, 0), (8, 0, 77), (65, 1, 0)))
    printed, asked = run(LOADED + launches + "; print('done')")
    assert printed == "done"
    assert asked == [
        "retain 0",
        "load fatbin",
        "gradsel_topk_one_32 device 0 grid 25 1 1 block 128 1 1 shared 64 stream 0 first abc0",
        "gradsel_topk_few_32 device 0 grid 25 1 1 block 128 1 1 shared 6160 stream 77 first abc0",
        "retain 1",
        "gradsel_topk_many_32 device 1 grid 100 1 1 block 256 1 1 shared 2048 stream 0 first abc0",
    ]


def test_threads_and_contexts(run):
    """A thread that has no context gets the device's for the launch, and no longer."""
    code = "import threading; call = lambda: " + TOPK.format(k=1, device=1, stream=0)
    code += "; threads = [threading.Thread(target=call) for _ in range(3)]; [t.start() for t in threads]; "
    code += "[t.join() for t in threads]; call()"
    _, asked = run(LOADED + code)
    assert asked[:2] == ["retain 1", "load fatbin"]
    assert len(asked) == 6
    assert all("device 1" in line for line in asked[2:])


@pytest.mark.parametrize(
    ("driver", "settings", "said"),
    [
        ("whole", {}, "None"),
        ("lacking", {}, "the NVIDIA driver has no cuGetErrorString"),
        ("whole", {"INIT": 100}, "the NVIDIA driver finds no device"),
        ("whole", {"VERSION": 12000}, "the NVIDIA driver is for CUDA 12.0; these kernels need 12.1 or later"),
        ("whole", {"MAJOR": 7}, "the device has compute capability 7.x; these kernels need 8.0 or later"),
        ("whole", {"LOAD": 222}, r"loading the CUDA kernels: a fake error (CUDA error 222)"),
        ("whole", {"MARK": 500}, "kernels.fatbin and the C++ extension are of different sources; build both again"),
    ],
)
def test_why_a_device_is_off(run, driver, settings, said):
    printed, _ = run(LOADED + "print(C.cuda_why_off(0) or None)", driver, **settings)
    assert printed.removesuffix(".") == said or printed.startswith(said)


def test_a_launch_that_fails_says_which_and_why(run):
    call = TOPK.format(k=1, device=0, stream=0)
    code = LOADED + f"exec('try:\\n {call}\\nexcept RuntimeError as error:\\n print(error)')"
    printed, _ = run(code, LAUNCH=700)
    assert printed == "launching gradsel_topk_one_32: an illegal memory access was encountered (CUDA error 700)"
    printed, _ = run(code.replace("1, 0x1000, 0, 0", "1, 0x1000, 0, 5"))
    assert printed == "finding CUDA device 5: a fake error (CUDA error 101)"
