"""The package as installed: what it says when its extension is missing, what it depends on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WITHOUT_EXTENSION = """
import sys
import warnings

{break_it}
import torch
import gradsel_kernels as gk

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    grad = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 5.0]])
    assert gk.topk_rows(grad, 1).tolist() == [[1], [2]]
    assert gk.pack_bits(grad > 0).tolist() == [[5], [4]]
    state = [torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(())]
    gk.masked_adam_([grad], [torch.ones(2, 3)], [state[0]], [state[1]], [state[2]], lr=0.5,
                    indices=[gk.topk_rows(grad, 1)], layouts=[gk.Layout.COLS])
    assert grad.tolist() == [[1.0, -3.5, 2.0], [0.0, 0.0, 4.5]], grad
told = [str(w.message) for w in caught if "native" in str(w.message)]
assert len(told) == 1, told
assert "compiler" in told[0] and "slower" in told[0] and "install" in told[0], told
gk.show_config()
gk.use_backend("native")
try:
    gk.topk_rows(grad, 1)
except RuntimeError as error:
    assert "native backend was asked for" in str(error)
else:
    raise AssertionError("a forced backend that cannot run must say so")
"""


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "break_it",
    [
        "sys.modules['gradsel_kernels._C'] = None",
        # a stale build: it loads, but speaks another version of the calls
        "import types; stale = types.ModuleType('gradsel_kernels._C'); stale.ABI = -1; "
        "sys.modules['gradsel_kernels._C'] = stale",
    ],
    ids=["missing", "stale"],
)
def test_without_the_extension_everything_works_and_says_once_what_is_slower(break_it):
    printed = run(WITHOUT_EXTENSION.format(break_it=break_it))
    assert "native    cpu, off:" in printed
    assert "reference any, on:" in printed


def test_importing_needs_no_triton_and_no_gpu():
    code = """
import sys
import gradsel
assert "triton" not in sys.modules, "importing triton costs half a second"
import torch
assert not torch.cuda.is_initialized()
"""
    run(code)


#: In the repository, but not in the source distribution: what only its host, its editors and its CI read.
NOT_SHIPPED = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="this is no clone of git")
def test_the_source_distribution_has_every_file(tmp_path):
    """All that is not ignored, and nothing that was built. ``make dist`` builds the wheel from it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = {name for name in listed if not name.startswith(NOT_SHIPPED) and (ROOT / name).exists()}
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in files if "egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert files - made == expected


def test_setup_imports_no_torch():
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_one_version_everywhere():
    import gradsel
    import gradsel_kernels

    assert gradsel.__version__ == gradsel_kernels.__version__
    assert f"\nversion: {gradsel.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## (Unreleased|{re.escape(gradsel.__version__)} )", (ROOT / "CHANGELOG.md").read_text(), re.M)
