"""The layouts of FGVC and VTAB-1k: found, read with their own split, and checked before any training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.io import savemat

from gradsel.training import Config, DataConfig
from gradsel.training.data import read_data
from gradsel.training.layouts import LAYOUTS
from tests.support import data_roots as roots
from tests.support import runs


def read(path, **options):
    return read_data(DataConfig(path=str(path), **options))


def sizes(data):
    return {name: len(split.labels) for name, split in data.splits.items()}


def named(data, split):
    """The class of each image by the image's file."""
    pairs = zip(*data.splits[split], strict=True)
    return {path.rpartition("/")[2]: data.classes[label] for path, label in pairs}


def test_cub(tmp_path):
    data = read(roots.cub(tmp_path / "CUB_200_2011"))
    assert data.classes == ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"]
    assert sizes(data) == {"train": 6, "test": 3}
    assert named(data, "test")["002.Laysan_Albatross_2.jpg"] == "Laysan Albatross"
    assert "layout cub (CUB-200-2011): the official split, which has no validation set" in data.notes[0]
    assert read(tmp_path).splits == data.splits  # as it lies in the archive


def test_nabirds_has_the_classes_with_images_in_the_order_of_their_numbers(tmp_path):
    data = read(roots.nabirds(tmp_path))
    assert data.classes == ["Common Eider (Adult)", "Oak Titmouse"]
    assert sizes(data) == {"train": 4, "test": 2}
    assert named(data, "test") == {"02950.jpg": "Common Eider (Adult)", "08170.jpg": "Oak Titmouse"}
    assert "nabirds" in data.notes[0]


def test_flowers_validation_set_chooses_or_joins(tmp_path):
    roots.flowers(tmp_path)
    data = read(tmp_path)
    assert (data.classes, sizes(data)) == (["1", "2", "3"], {"train": 6, "validation": 3, "test": 3})
    assert named(data, "train") == {f"image_{n:05}.jpg": str(1 + (n - 1) % 3) for n in range(1, 7)}
    joined = read(tmp_path, validation="join")
    assert sizes(joined) == {"train": 9, "test": 3}
    assert "the validation set has joined the training set" in joined.notes


@pytest.mark.parametrize("lists", ["", "lists"])
def test_dogs(tmp_path, lists):
    data = read(roots.dogs(tmp_path, lists))
    assert (data.classes, sizes(data)) == (["Chihuahua", "Japanese spaniel"], {"train": 4, "test": 2})
    assert named(data, "test")["n02085782_2.jpg"] == "Japanese spaniel"


@pytest.mark.parametrize("write", [roots.cars, roots.cars_devkit])
def test_cars(tmp_path, write):
    data = read(write(tmp_path))
    assert data.classes == ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    assert sizes(data) == {"train": 4, "test": 2}
    assert data.splits["train"].labels == [0, 1, 0, 1]


def test_cars_without_the_labels_of_the_test_set(tmp_path):
    (roots.cars_devkit(tmp_path) / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(ValueError, match=r"no cars_test_annos_withlabels\.mat, the labels of the test set"):
        read(tmp_path)


def test_the_split_of_vpt_gives_way_to_the_official_one_unless_it_is_named(tmp_path):
    data = read(roots.vpt(tmp_path))
    assert (data.classes, sizes(data)) == (["5", "12"], {"train": 4, "validation": 2, "test": 2})
    assert "VPT's split, with which GPS was run" in data.notes[0]
    roots.cub(tmp_path)
    both = read(tmp_path)
    assert sizes(both) == {"train": 6, "test": 3}
    assert "it has the layout vpt as well, which --layout vpt reads" in both.notes
    assert read(tmp_path, layout="vpt").splits == data.splits


def test_vtab(tmp_path):
    data = read(roots.vtab(tmp_path), classes=3)
    assert (data.classes, sizes(data)) == (["0", "1", "2"], {"train": 8, "validation": 4, "test": 4})
    joined = read(tmp_path, validation="join")
    assert sizes(joined) == {"train": 12, "test": 4}
    assert "the published lists train800val200.txt, test.txt" in joined.notes[0]
    for name in ("train800.txt", "val200.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "train800val200.txt").rename(tmp_path / "train1000.txt")
    assert read(tmp_path).splits == joined.splits


def test_classes_without_training_samples_are_told_in_published_data(tmp_path):
    roots.vtab(tmp_path)
    (tmp_path / "test.txt").write_text("images/test/0.jpg 0\nimages/test/1.jpg 4\nimages/test/2.jpg 4\n")
    data = read(tmp_path, classes=6, validation="join")
    assert "3 classes have no training sample: 3, 4, 5" in data.notes
    assert "1 classes are in the test set only (2 samples): 4" in data.notes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "images.txt").write_text("1 a.jpg\n2 b.jpg\n99 c.jpg\n"),
            r"1 images of .*images\.txt are not in image_class_labels\.txt: 99",
        ),
        (
            lambda root: (root / "classes.txt").write_text("1 001.A\n2 002.B\n"),
            r"3 labels are out of range, as classes\.txt does not have them: 3",
        ),
        (
            lambda root: (root / "train_test_split.txt").write_text("1 1\n2\n3\n"),
            r"2 lines of .*train_test_split\.txt have no space between a key and a value: 2, 3",
        ),
        (lambda root: (root / "classes.txt").unlink(), r"classes\.txt cannot be read"),
    ],
)
def test_what_is_wrong_with_lists_is_named_and_counted(tmp_path, spoil, message):
    spoil(roots.cub(tmp_path))
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_and_unreadable_images_are_named_counted_or_left_out(tmp_path):
    roots.cub(tmp_path)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    images[0].unlink()
    images[4].unlink()
    images[8].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"2 images are listed but missing: .*_0\.jpg, .*_1\.jpg; pass --skip"):
        read(tmp_path)
    data = read(tmp_path, skip_unreadable=True)
    assert sizes(data) == {"train": 4, "test": 2}
    assert any("left out: 1 images cannot be read" in note for note in data.notes)


def test_labels_out_of_range(tmp_path):
    roots.vtab(tmp_path)
    with pytest.raises(ValueError, match=r"2 labels of the train set are out of range \(2\); there are 2 classes"):
        read(tmp_path, classes=2)
    roots.flowers(tmp_path / "flowers")
    savemat(tmp_path / "flowers" / "imagelabels.mat", {"labels": np.array([[0, *range(1, 12)]])})
    with pytest.raises(ValueError, match=r"1 labels of the train set are out of range \(-1\)"):
        read(tmp_path / "flowers")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("setid.mat", b"", r"setid\.mat cannot be read"),
        ("imagelabels.mat", None, r"imagelabels\.mat has no variable labels"),
    ],
)
def test_a_damaged_file_of_matlab(tmp_path, name, content, message):
    roots.flowers(tmp_path)
    if content is None:
        savemat(tmp_path / name, {"other": 1})
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)


def test_lines_that_are_no_path_and_number(tmp_path):
    (roots.vtab(tmp_path) / "test.txt").write_text("images/test/0.jpg\t1\nimages/test/1.jpg\n\nx y\n")
    with pytest.raises(ValueError, match=r"2 lines of .*test\.txt are not a path and a number: 2, 4"):
        read(tmp_path)
    (roots.vpt(tmp_path / "birds") / "val.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"val\.json must hold the class of each image"):
        read(tmp_path / "birds")


def test_a_layout_that_is_named_but_not_there(tmp_path):
    roots.cub(tmp_path)
    with pytest.raises(ValueError, match=r"not in the layout vtab \(VTAB-1k\); it has classes\.txt"):
        read(tmp_path, layout="vtab")
    for layout in LAYOUTS:
        Config.from_dict({"data": {"layout": layout}})
    with pytest.raises(ValueError, match=r"data\.layout is 'cab', expected one of .*did you mean cub"):
        Config.from_dict({"data": {"layout": "cab"}})
    runs.image_folder(tmp_path / "own", train=2, test=1)
    assert read(tmp_path / "own", layout="folder").classes == sorted(runs.COLOURS)


def test_several_data_sets_in_a_folder(tmp_path):
    roots.cub(tmp_path / "CUB_200_2011")
    roots.dogs(tmp_path / "stanforddogs")
    with pytest.raises(ValueError, match="several data sets; pass one of its folders: CUB_200_2011, stanforddogs"):
        read(tmp_path)
