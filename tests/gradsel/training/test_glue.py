"""Tasks of GLUE: the distributed files, and metrics by scikit-learn."""

from __future__ import annotations

import pytest
import torch
from transformers import EvalPrediction

from gradsel.training import Config, DataConfig
from gradsel.training.classification import Classification
from gradsel.training.data import read_data
from gradsel.training.evaluation import metrics
from gradsel.training.glue import TASKS, scores
from tests.support import data_roots as roots
from tests.support import runs


def read(path, task):
    return read_data(DataConfig(path=str(path), task=f"glue/{task}"))


@pytest.mark.parametrize("task", ["cola", "mrpc", "rte"])
def test_the_distributed_files(tmp_path, task):
    data = read(roots.glue(tmp_path / task, task), task)
    columns = 1 if task == "cola" else 2
    assert data.classes == list(TASKS[f"glue/{task}"].classes)
    assert {name: len(split.labels) for name, split in data.splits.items()} == {"train": 8, "test": 4}
    assert data.splits["train"].labels == [0, 1] * 4
    assert all(len(texts) == columns for texts in data.splits["train"].inputs)
    assert data.splits["test"].inputs[0][-1] == '"a cold thing here as told'  # a quote is no quote here
    assert f"glue/{task} from train.tsv, dev.tsv; the development set is the test set" in data.notes[0]


def test_other_names_of_the_files(tmp_path):
    folder = roots.glue(tmp_path / "mrpc", "mrpc")
    (folder / "msr_paraphrase_train.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "train.tsv").read_bytes())
    (folder / "train.tsv").rename(folder / "msr_paraphrase_test.txt")
    (folder / "dev.tsv").unlink()
    assert len(read(folder, "mrpc").splits["test"].labels) == 8
    folder = roots.glue(tmp_path / "cola", "cola")
    (folder / "raw").mkdir()
    (folder / "train.tsv").rename(folder / "raw" / "in_domain_train.tsv")
    for part in ("in", "out_of"):
        (folder / "raw" / f"{part}_domain_dev.tsv").write_bytes((folder / "dev.tsv").read_bytes())
    (folder / "dev.tsv").unlink()
    assert len(read(folder, "cola").splits["test"].labels) == 8


def test_files_of_another_task_are_refused_and_lines_counted(tmp_path):
    with pytest.raises(ValueError, match=r"7 lines of .*train\.tsv are not those of glue/cola.*: 1, 4, 5, "):
        read(roots.glue(tmp_path / "m", "mrpc"), "cola")
    with pytest.raises(ValueError, match=r"there is no folder .*/none with the files of glue/rte"):
        read(tmp_path / "none", "rte")
    (tmp_path / "t").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "t" / f"{name}.csv").write_text("sentence1,sentence2,label\na,b,entailment\nc,d,not_entailment\n")
    assert read(tmp_path / "t", "rte").classes == ["entailment", "not_entailment"]
    with pytest.raises(ValueError, match=r"has not the files of glue/rte; expected are train\.tsv or dev\.tsv"):
        read(tmp_path, "rte")
    folder = roots.glue(tmp_path / "r", "rte")
    with (folder / "dev.tsv").open("a") as file:
        file.write("9\tone\ttwo\tneutral\n10\tone\n")
    with pytest.raises(ValueError, match=r"2 lines of .*dev\.tsv are not those of glue/rte.*: 6, 7"):
        read(folder, "rte")


def test_without_a_folder_it_comes_from_the_hub(monkeypatch):
    import datasets

    def load(path, name=None, **options):
        assert (path, name) == ("nyu-mll/glue", "rte")
        text = datasets.Value("string")
        label = datasets.ClassLabel(names=["entailment", "not_entailment"])
        features = datasets.Features({"sentence1": text, "sentence2": text, "label": label})
        sets = {
            key: {"sentence1": ["a"] * len(labels), "sentence2": ["b"] * len(labels), "label": labels}
            for key, labels in {"train": [0, 1, 0, 1], "validation": [1, 0], "test": [-1, -1]}.items()
        }
        return datasets.DatasetDict({key: datasets.Dataset.from_dict(each, features) for key, each in sets.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = read("", "rte")
    assert {name: len(split.labels) for name, split in data.splits.items()} == {"train": 4, "test": 2}
    Config.from_dict({"data": {"task": "glue/rte"}, "model": {"name": "m"}, "output": {"folder": "x"}}).require()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"glue/rte cannot be fetched from the hub; pass --data"):
        read("", "rte")


def test_metrics_by_hand():
    labels = torch.tensor([1, 1, 1, 0, 0])
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    tp, fp, fn, tn = 2, 1, 1, 1
    correlation = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert scores("glue/cola", logits, labels) == pytest.approx({"matthews": 100 * correlation, "accuracy": 60})
    assert scores("glue/mrpc", logits, labels) == pytest.approx({"f1": 200 * tp / (2 * tp + fp + fn), "accuracy": 60})
    assert metrics(logits, labels, ["a", "b"], "glue/rte")["glue"] == {"accuracy": 60.0}
    assert "glue" not in metrics(logits, labels, ["a", "b"])


def test_a_run_reports_the_metrics_of_the_task(tmp_path, bert):
    from gradsel.training import evaluate, finetune

    data = roots.glue(tmp_path / "rte", "rte")
    config = runs.text_run(data, bert, tmp_path / "run", data__task="glue/rte", recipe__epochs=1)
    found = finetune(config, quiet=True).metrics
    assert found["glue"] == {"accuracy": found["top1"]}
    assert evaluate(tmp_path / "run")["glue"] == found["glue"]
    assert "accuracy" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews"), ("mrpc", "f1"), ("rte", "accuracy")])
def test_the_best_epoch_is_chosen_by_the_metric_of_the_task(task, metric, tmp_path, bert):
    from gradsel.training import finetune

    data = roots.glue(tmp_path / task, task)
    config = runs.text_run(
        data, bert, tmp_path / "run", data__task=f"glue/{task}", data__validation_holdout=0.4, recipe__epochs=3,
        output__report=task == "cola",
    )  # fmt: skip
    results = finetune(config, quiet=True).results
    scores = [(entry[f"eval_{metric}"], -entry["step"]) for entry in results["history"] if f"eval_{metric}" in entry]
    assert len(scores) == 3
    assert results["best_checkpoint"] == -max(scores)[1]
    if task == "cola":
        assert "Matthews correlation on validation, %" in (tmp_path / "run" / "report.html").read_text()


def test_a_better_matthews_correlation_beats_more_right_answers():
    """Accuracy prefers the first guess, which is always the larger class."""
    labels = torch.tensor([1] * 7 + [0] * 3)
    always, rarer = torch.ones(10).long(), torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    config = Config.from_dict({"data": {"task": "glue/cola"}})
    found = [
        Classification().score(EvalPrediction(torch.eye(2)[guess].numpy(), labels.numpy()), config)
        for guess in (always, rarer)
    ]
    assert found[0]["top1"] > found[1]["top1"]
    assert Classification().metric(config) == "matthews"
    assert found[0]["matthews"] < found[1]["matthews"]
