"""Data sets of torchvision by name, whatever datasets loads, and tables of images."""

from __future__ import annotations

import csv

import datasets
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from gradsel.training import Config, DataConfig
from gradsel.training.data import portable_path, read_data
from gradsel.training.datasets import Images, open_image
from tests.support import data_roots as roots
from tests.support import runs


def read(path, **options):
    return read_data(DataConfig(path=str(path), **options))


def sizes(data):
    return {name: len(split.labels) for name, split in data.splits.items()}


# --- torchvision


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision's CIFAR data sets without checksums."""
    for kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def test_a_data_set_of_torchvision(tmp_path, unchecked):
    data = read("torchvision/cifar10", root=str(roots.cifar(tmp_path)))
    assert (data.kind, data.classes[3], len(data.classes)) == ("images", "class 3", 10)
    assert sizes(data) == {"train": 20, "test": 4}
    assert data.splits["train"].labels[:6] == [0, 1, 2, 3, 4, 5]
    image = data.splits["train"].inputs[5]
    assert open_image(image).size == (32, 32)
    assert open_image(image).tobytes() == CIFAR10(tmp_path)[5][0].tobytes()
    assert str(image) == "image 5 of CIFAR10, train"
    sample = Images(data.splits["test"], lambda opened: opened.size)[1]
    assert sample == {"pixel_values": (32, 32), "labels": data.splits["test"].labels[1]}


def test_a_split_of_torchvision_by_name(tmp_path, monkeypatch):
    roots.flowers(tmp_path / "flowers-102")
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    data = read("torchvision/Flowers102", root=str(tmp_path))
    assert sizes(data) == {"train": 6, "validation": 3, "test": 3}
    assert sizes(read("torchvision/Flowers102", root=str(tmp_path), validation="join")) == {"train": 9, "test": 3}


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("torchvision/CIFAR11", {}, r"torchvision has no data set 'CIFAR11'; did you mean CIFAR10"),
        ("torchvision/CIFAR10", {}, r"data\.root is not set; pass --root, the folder of torchvision's CIFAR10"),
        ("torchvision/CIFAR10", {"root": "."}, r"cannot read CIFAR10 in \. \(.*\); pass --download to fetch it"),
        ("torchvision/EMNIST", {"root": "."}, r"torchvision cannot read EMNIST in \. \([^()]*\(\)[^)]*'split'\)$"),
    ],
)
def test_what_torchvision_cannot_give(path, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        read(path, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_torchvision_fetches_only_what_it_is_asked_to(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: bool(fetched))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr(CIFAR10, "download", lambda self: fetched or fetched.append(roots.cifar(tmp_path)))
    with pytest.raises(ValueError, match="pass --download to fetch it"):
        read("torchvision/CIFAR10", root=str(tmp_path))
    assert not fetched
    assert sizes(read("torchvision/CIFAR10", root=str(tmp_path), download=True)) == {"train": 20, "test": 4}


@pytest.mark.parametrize(
    ("labels", "message"),
    [([{"box": 1}] * 3, "it has no class numbers"), (None, "has no training set of a known name")],
)
def test_a_data_set_of_torchvision_that_has_no_classes(monkeypatch, tmp_path, labels, message):
    class Other(CIFAR10):
        def __init__(self, root, split="first"):
            if labels is None:
                raise ValueError(f"Unknown value '{split}' for argument split")
            self.targets, self.data = labels, labels

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Other)
    with pytest.raises(ValueError, match=message):
        read("torchvision/CIFAR10", root=str(tmp_path))


# --- datasets


def images_of(count, offset=0):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [open_image(path) for path in PICTURES[offset : offset + count]]
    return datasets.Dataset.from_dict({"image": pictures, "label": [n % 2 for n in range(count)]}, features)


@pytest.fixture(scope="module", autouse=True)
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    PICTURES[:] = [str(roots.picture(folder / f"{number}.png", number)) for number in range(8)]


PICTURES: list[str] = []


def test_images_that_were_saved_to_disk(tmp_path):
    saved = datasets.DatasetDict({"train": images_of(4), "test": images_of(2, 4), "extra": images_of(1)})
    saved.save_to_disk(str(tmp_path / "pets"))
    data = read(tmp_path / "pets")
    assert (data.kind, data.classes, sizes(data)) == ("images", ["cat", "dog"], {"train": 4, "test": 2})
    assert "not used: extra" in data.notes
    assert open_image(data.splits["test"].inputs[1]).tobytes() == open_image(PICTURES[5]).tobytes()
    assert read(f"hf/{tmp_path / 'pets'}").splits["train"].labels == [0, 1, 0, 1]


def test_a_folder_that_load_dataset_reads(tmp_path):
    roots.glue(tmp_path / "rte", "rte")
    for name in ("train", "dev"):
        (tmp_path / "rte" / f"{name}.tsv").unlink()
    for name, count in (("train", 6), ("validation", 2), ("test", 2)):
        label = "-1" if name == "test" else "{}"
        rows = [f'{{"text": "t{n}", "label": {label.format(n % 2)}}}' for n in range(count)]
        (tmp_path / "rte" / f"{name}.jsonl").write_text("\n".join(rows))
    data = read(f"hf/{tmp_path / 'rte'}")
    assert (data.kind, sizes(data)) == ("texts", {"train": 6, "test": 2})
    assert "left out: the set test, whose labels nobody has published" in data.notes


def test_what_datasets_cannot_load(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"datasets cannot load hf/nobody/nothing:it \(") as raised:
        read("hf/nobody/nothing:it")
    assert "\n" not in str(raised.value)
    datasets.DatasetDict({"test": images_of(2)}).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"has no training set; it has test"):
        read(tmp_path / "x")


def test_paths_of_data_are_absolute_in_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert portable_path("own") == str(tmp_path / "own")
    assert portable_path("hf/own") == f"hf/{tmp_path / 'own'}"
    for name in ("hf/nyu-mll/glue:rte", "torchvision/CIFAR10", ""):
        assert portable_path(name) == name


# --- Tables of images


def table(path, rows, columns=("file_name", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_a_table_of_paths(tmp_path):
    runs.image_folder(tmp_path / "files", train=2)
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "files").rglob("*.png"))
    data = read(table(tmp_path / "t.csv", [(file, file.parts[2]) for file in files]), holdout=0.5)
    assert (data.kind, data.classes, sizes(data)) == ("images", sorted(runs.COLOURS), {"train": 3, "test": 3})
    assert "images from file_name, classes from label" in data.notes
    assert all(path.startswith(str(tmp_path)) for path in data.splits["train"].inputs)


def test_a_table_beside_the_images_that_it_lists(tmp_path):
    runs.image_folder(tmp_path / "images", train=2)
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "images").rglob("*.png"))
    rows = [(file, file.parts[2]) for file in files]
    table(tmp_path / "train.csv", rows[:-1])
    table(tmp_path / "test.csv", rows[-1:])
    assert sizes(read(tmp_path)) == {"train": 5, "test": 1}
    assert sizes(read(tmp_path, kind="images")) == {"train": 5, "test": 1}


def test_a_folder_of_tables_of_paths_with_classes_by_number(tmp_path):
    for name, labels in (("train", [0, 1, 0, 3]), ("test", [2, 1])):
        table(tmp_path / f"{name}.csv", [(PICTURES[n], label) for n, label in enumerate(labels)], ("where", "label"))
    data = read(tmp_path, image_column="where", classes=4)
    assert (data.classes, data.splits["train"].labels) == (["0", "1", "2", "3"], [0, 1, 0, 3])
    assert "1 classes are in the test set only (1 samples): 2" in data.notes
    with pytest.raises(ValueError, match=r"1 labels of the train set are out of range.*3; first in row 4"):
        read(tmp_path, image_column="where", classes=3)
    with pytest.raises(ValueError, match=r"1 classes are in the test set only \(1 rows\): 2"):
        read(tmp_path, image_column="where")
    with pytest.raises(ValueError, match=r"no column 'wher'; did you mean where"):
        read(tmp_path, image_column="wher")
    with pytest.raises(ValueError, match=r"which column has the images\? pass --image-column"):
        read(tmp_path, kind="images")


def test_rows_whose_images_are_missing(tmp_path):
    rows = [(PICTURES[0], "a"), ("lost.png", "b"), (PICTURES[1], "b"), (PICTURES[2], "a")]
    with pytest.raises(ValueError, match=r"1 images are listed but missing: .*lost\.png"):
        read(table(tmp_path / "t.csv", rows))
    rows[1] = ("", "b")
    with pytest.raises(ValueError, match=r"1 rows of the train set have no path in file_name, first row 2"):
        read(table(tmp_path / "u.csv", rows))


def test_a_run_on_images_that_have_no_files(tmp_path):
    from gradsel.training import evaluate, finetune

    saved = datasets.DatasetDict({"train": images_of(8), "test": images_of(4)})
    saved.save_to_disk(str(tmp_path / "pets"))
    config = runs.image_run(tmp_path / "pets", tmp_path / "run", recipe__epochs=1, output__report=True)
    result = finetune(config, quiet=True)
    assert evaluate(tmp_path / "run") == result.metrics
    assert "saved" not in Config.from_dict(config.to_dict()).data.path
