"""Results on a model hub: pushed in one commit, fetched elsewhere, and used there."""

from __future__ import annotations

import pytest
import yaml

import gradsel
from gradsel.cli import main as cli
from gradsel.training import Result, RunError
from tests.support import hub, runs


@pytest.fixture
def served(monkeypatch, tmp_path):
    with hub.used_by_all(monkeypatch, tmp_path / "cache") as repos:
        yield repos


def test_a_pushed_result_works_elsewhere(images, tmp_path, served, monkeypatch):
    result = gradsel.finetune(runs.image_run(images, tmp_path / "run"), quiet=True)
    address = result.push_to_hub("user/colours", token="right")
    assert address.endswith(f"/user/colours/commit/{hub.COMMIT}")
    pushed = served["user/colours"]
    assert set(pushed) == {
        "README.md", "config.yaml", "delta.safetensors", "labels.json", "results.json", "selection.safetensors",
    }  # fmt: skip
    assert str(tmp_path).encode() not in b"".join(pushed.values())
    assert yaml.safe_load(pushed["config.yaml"])["data"]["path"] == "images"

    monkeypatch.chdir(tmp_path)
    fetched = Result.from_pretrained("user/colours")
    assert fetched.folder != result.folder
    assert fetched.results == result.results
    assert gradsel.evaluate(fetched.folder, images) == result.metrics
    runs.check_same_result(fetched, Result.from_pretrained(result.folder))


def test_the_command(images, tmp_path, served, capsys):
    gradsel.finetune(runs.image_run(images, tmp_path / "run", recipe__epochs=1), quiet=True)
    capsys.readouterr()
    assert cli.main(["push", str(tmp_path / "run"), "user/colours", "--token", "right"]) == 0
    assert "/user/colours/commit/" in capsys.readouterr().out
    assert cli.main(["push", str(tmp_path / "run"), "user/colours", "--token", "wrong"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("gradsel push: user/colours cannot be pushed (")
    assert printed.count("\n") == 1


def test_what_cannot_be_pushed_or_fetched(tmp_path, served):
    with pytest.raises(RunError, match=r"there is no folder user/nothing, and no result .*RepositoryNotFound"):
        Result.from_pretrained("user/nothing")
    with pytest.raises(RunError, match=r"holds no finished result of gradsel: it has no config\.yaml"):
        Result.from_pretrained(tmp_path)
    with pytest.raises(RunError, match="there is no configuration file"):
        Result(tmp_path, {}).push_to_hub("user/colours")
