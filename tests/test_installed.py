"""The package as its users have it: these tests run on the repository and, by ``make dist``, on an installed wheel."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch

import gradsel
import gradsel_kernels as gk

FROM_A_WHEEL = not (Path(gk.__file__).parents[1] / "setup.py").exists()


def test_data_files_are_there():
    for package, name in (
        ("gradsel", "py.typed"),
        ("gradsel", "papers/printed.json"),
        ("gradsel", "training/templates/page.html.jinja"),
        ("gradsel_kernels", "py.typed"),
    ):
        assert (resources.files(package) / name).is_file(), f"{package}/{name} is not in the package"


def test_the_extension_is_there_and_used(capsys):
    """A wheel without it would be slower, and say so only when it is used."""
    with gk.use_backend("native"):
        assert gk.topk_rows(torch.tensor([[1.0, -3.0, 2.0]]), 2).tolist() == [[1, 2]]


def test_training_with_the_installed_package(tmp_path):
    """Selecting, training, saving and applying, on one small model."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    model.load_state_dict(base.state_dict())
    batch = (torch.randn(64, 16), torch.arange(64) % 4)
    selection = gradsel.select(model, [batch], gradsel.cross_entropy, gradsel.PerNeuron(2))
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = gradsel.cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gradsel.save_delta(model, tmp_path / "task.safetensors")
    gradsel.Delta.load(tmp_path / "task.safetensors").apply_(base)
    assert torch.equal(base(batch[0]), gradsel.detach(model)(batch[0]))


def test_the_module_is_the_command_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "gradsel", "--version"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"gradsel {gradsel.__version__}\n"


@pytest.mark.skipif(not FROM_A_WHEEL, reason="the package is not from a wheel; make dist installs one")
def test_metadata_are_those_of_the_package():
    metadata = importlib.metadata.metadata("gradsel-kernels")
    assert metadata["Version"] == gradsel.__version__
    assert "torch>=2.11" in importlib.metadata.requires("gradsel-kernels")
