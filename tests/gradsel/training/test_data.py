"""Reading data: layouts, splits, and everything that is wrong named before training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from gradsel.training import DataConfig
from gradsel.training.data import hold_out, read_data
from gradsel.training.datasets import Images, SelectionBatches
from tests.support import runs


def read(path, **options):
    return read_data(DataConfig(path=str(path), **options))


def sizes(data):
    return {name: len(split.labels) for name, split in data.splits.items()}


# --- Images


def test_a_part_of_the_training_set_is_kept_for_validation(images, tmp_path):
    test_only = runs.image_folder(tmp_path / "own", train=6, test=4)
    data = read(test_only, validation_holdout=0.34)
    assert sizes(data) == {"train": 12, "test": 12, "validation": 6}
    train, validation = data.splits["train"], data.splits["validation"]
    assert sorted(train.inputs + validation.inputs) == sorted(read(test_only).splits["train"].inputs)
    assert sorted(validation.labels) == [0, 0, 1, 1, 2, 2]
    assert "6 training samples are kept for validation, with seed 0" in data.notes
    assert sizes(read(images, validation_holdout=0.5)) == sizes(read(images))  # it has one


def test_what_is_held_out_depends_on_a_seed_of_its_own(tmp_path):
    path = runs.image_folder(tmp_path / "own")
    config = DataConfig(path=str(path), validation_holdout=0.3, split_seed=5)
    one, other = read_data(config, seed=1), read_data(config, seed=2)
    assert one == other == read_data(DataConfig(path=str(path), validation_holdout=0.3), seed=5)
    assert one.splits != read_data(DataConfig(path=str(path), validation_holdout=0.3), seed=1).splits


def test_folders_of_images(images):
    data = read(images)
    assert (data.kind, data.classes) == ("images", sorted(runs.COLOURS))
    assert sizes(data) == {"train": 18, "validation": 9, "test": 12}
    for path, label in zip(*data.splits["train"], strict=True):
        assert f"/train/{data.classes[label]}/" in path


def test_one_further_folder_is_the_test_set(tmp_path):
    assert sizes(read(runs.image_folder(tmp_path, train=3, val=2))) == {"train": 9, "test": 6}


def test_a_plain_folder_is_split_by_the_seed(tmp_path):
    runs.image_folder(tmp_path)
    data, again = read(tmp_path), read(tmp_path)
    assert sizes(data) == {"train": 15, "test": 3}
    assert data.splits == again.splits
    assert sorted(data.splits["test"].labels) == [0, 1, 2]
    assert not set(data.splits["train"].inputs) & set(data.splits["test"].inputs)
    assert "no test set: 3 samples are held out, with seed 0" in data.notes[0]
    assert read_data(DataConfig(path=str(tmp_path)), seed=1).splits != data.splits


def test_a_class_with_one_sample_stays_in_training():
    from gradsel.training.data import Split

    train, test = hold_out(Split(list("abcde"), [0, 1, 1, 1, 1]), 0.5, 0)
    assert 0 in train.labels
    assert test.labels == [1, 1]


def test_unreadable_images_are_named_or_left_out(tmp_path):
    runs.image_folder(tmp_path, train=4, test=2)
    good = (tmp_path / "train/red/0.png").read_bytes()
    (tmp_path / "train/red/0.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "test/blue/1.png").write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"2 images cannot be read: .*red/0.png.*blue/1.png.*--skip-unreadable"
    ) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)
    data = read(tmp_path, skip_unreadable=True)
    assert sizes(data) == {"train": 11, "test": 5}
    assert "left out: 2 images" in data.notes[0]


def test_empty_and_unknown_classes(tmp_path):
    runs.image_folder(tmp_path, train=2, test=2)
    (tmp_path / "train" / "yellow").mkdir()
    with pytest.raises(ValueError, match="1 classes have no training sample: yellow"):
        read(tmp_path)
    (tmp_path / "train" / "yellow").rmdir()
    (tmp_path / "test" / "violet").mkdir()
    with pytest.raises(ValueError, match="1 classes of the test set have no folder in training: violet"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "birds", "there is no file or folder"),
        (lambda root: root, "has no folders, one for each class"),
        (lambda root: runs.image_folder(root, test=1), "has test, but no folder train"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read(make(tmp_path))


def test_augmentation_depends_on_seed_epoch_and_sample_alone(images):
    split = read(images).splits["train"]

    def noisy(image):
        return torch.rand(2)

    before = torch.get_rng_state()
    data = Images(split, noisy, seed=3)
    first, other = data[4]["pixel_values"], data[5]["pixel_values"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(data[4]["pixel_values"], first)
    assert not torch.equal(first, other)
    data.epoch = 1
    assert not torch.equal(data[4]["pixel_values"], first)
    assert not torch.equal(Images(split, noisy, seed=2**31 - 1)[4]["pixel_values"], first)
    views = Images(split, noisy, seed=3, views=2)[4]["pixel_values"]
    assert torch.equal(views[0], first)
    assert not torch.equal(views[1], first)


def test_images_in_any_mode_become_rgb(tmp_path):
    from gradsel.training.datasets import open_image

    for mode in ("L", "P", "RGBA", "1", "I;16"):
        Image.new(mode, (4, 5)).save(tmp_path / "x.png")
        assert (open_image(tmp_path / "x.png").mode, open_image(tmp_path / "x.png").size) == ("RGB", (4, 5))


def test_batches_to_select_on_are_the_same_in_every_pass_and_have_pairs():
    data = [{"x": torch.tensor(n), "labels": n // 2} for n in range(8)]

    def stack(samples):
        return {name: torch.tensor([int(s[name]) for s in samples]) for name in ("x", "labels")}

    batches = SelectionBatches(data, 3, stack, torch.device("cpu"), seed=0)
    passes = [[batch["x"].tolist() for batch in batches] for _ in range(2)]
    assert passes[0] == passes[1]
    assert batches.left_out == 3 - len(passes[0])
    assert all(len({x // 2 for x in batch}) < len(batch) for batch in passes[0])
    with pytest.raises(
        ValueError, match=r"no batch to select on, of 8, has two samples of a class.*larger --batch-size"
    ):
        list(SelectionBatches(data, 1, stack, torch.device("cpu"), seed=0))
    everything = SelectionBatches(data, 3, stack, torch.device("cpu"), seed=0, pairs=False)
    assert sorted(x for batch in everything for x in batch["x"].tolist()) == list(range(8))


# --- Texts


def write(path, rows):
    lines = [",".join(rows[0]), *(",".join(str(row[name]) for name in rows[0]) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_texts(table):
    data = read(table)
    assert (data.kind, data.classes) == ("texts", ["bad", "good"])
    assert sizes(data) == {"train": 20, "test": 4}
    assert "texts from text, classes from label" in data.notes


def test_a_folder_of_tables_with_pairs_of_texts(tmp_path):
    for name, count in (("train", 6), ("dev", 2), ("test", 4)):
        rows = [{"sentence1": f"a{n}", "sentence2": "b", "label": n % 2, "idx": n} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(tmp_path)
    assert sizes(data) == {"train": 6, "validation": 2, "test": 4}
    assert data.classes == ["0", "1"]
    assert data.splits["train"].inputs[1] == ("a1", "b")


def test_columns_can_be_named(tmp_path):
    rows = [{"id": f"x{n}", "left": f"l{n}", "right": "r", "note": "n", "kind": n % 3} for n in range(9)]
    write(tmp_path / "t.csv", rows)
    data = read(tmp_path / "t.csv", text_columns=["right", "left"], label_column="kind")
    assert data.classes == ["0", "1", "2"]
    assert all(row[0] == "r" for row in data.splits["train"].inputs)
    with pytest.raises(ValueError, match=r"which column has the class.*id, left, right, note, kind"):
        read(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"which columns have the texts.*--text-column"):
        read(tmp_path / "t.csv", label_column="kind")
    with pytest.raises(ValueError, match="no column 'kinds'; did you mean kind"):
        read(tmp_path / "t.csv", label_column="kinds")
    with pytest.raises(ValueError, match="no column 'lefty'; did you mean left"):
        read(tmp_path / "t.csv", label_column="kind", text_columns=["lefty"])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            [("a", 0), ("b", -1), ("c", 1), ("d", -1)],
            None,
            r"2 labels of the train set are out of range.*-1; first in row 2",
        ),
        ([("a", 0), ("b", ""), ("c", 1)], None, "1 labels of the train set are out of range or missing"),
        ([("a", 0), ("b", 1)], [("c", 2), ("d", 2)], r"1 classes are in the test set only \(2 rows\): 2"),
        ([("a", 0), ("", 1)], [("c", 1)], "1 rows of the train set have no text in text, first row 2"),
        ([(5, 0), (7, 1)], None, "2 rows of the train set have no text in text, first row 1, which has 5"),
        (
            [("a", 0), ("b", 0.5)],
            None,
            r"1 labels .* out of range .*\(values 0.5; first in row 2\); a class is a word, or",
        ),
        ([("a", "x"), ("b", "y"), ("c", "x ")], None, "column 'label' has both 'x' and 'x '; make them one class"),
        ([("a", 0), ("b", 0)], None, "one class only, '0'"),
        ([("a", n) for n in range(30)], None, "30 different values, so it is not a class"),
    ],
)
def test_bad_rows_are_counted(tmp_path, train, test, message):
    for name, rows in (("train", train), ("test", test)):
        if rows is not None:
            write(tmp_path / f"{name}.csv", [{"text": text, "label": label} for text, label in rows])
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_labels_that_are_lists_are_counted(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["y"]}\n')
    with pytest.raises(
        ValueError, match=r"2 labels of the train set are out of range .*\['x'\], \['y'\]; first in row 1"
    ):
        read(tmp_path / "t.jsonl")


def test_whole_numbers_written_as_floats_are_numbers(tmp_path):
    """As in a table of pandas whose column of integers had an empty row."""
    rows = [{"text": f"t{n}", "label": float(n % 2)} for n in range(8)]
    assert read(write(tmp_path / "t.csv", rows)).classes == ["0", "1"]


def test_what_may_be_a_mistake_in_the_classes_is_told(tmp_path):
    rows = [{"text": f"t{n}", "label": ("good", "Good", "bad")[n % 3]} for n in range(9)] + [
        {"text": "t", "label": "odd"}
    ]
    notes = read(write(tmp_path / "t.csv", rows)).notes
    assert "warning: classes that differ in upper and lower case only: Good and good" in notes
    assert "warning: the test set has no sample of 1 classes: odd" in notes
    assert not [note for note in read(write(tmp_path / "u.csv", rows[2:-1:3] + rows[:-1:3])).notes if "warning" in note]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": ["label"]}, "column 'label' has the class, so it cannot be an input, too"),
        ({"text_columns": ["text", "text"]}, "must be one or two columns, got text, text"),
    ],
)
def test_settings_that_do_not_fit_a_table(options, message, table):
    with pytest.raises(ValueError, match=message):
        read(table, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "label"}, "data.label_column is for tables, but .* is a folder of images"),
        ({"text_columns": ["text"]}, "data.text_columns is for tables"),
    ],
)
def test_settings_of_tables_are_not_ignored_for_folders_of_images(options, message, images):
    with pytest.raises(ValueError, match=message):
        read(images, **options)


def test_a_number_of_classes_that_the_data_do_not_have_is_told(table, images):
    for path, found in ((table, 2), (images, 3)):
        told = f"warning: data.classes is 5, but the data name {found} classes"
        assert told in read(path, classes=5).notes
        assert told not in read(path, classes=found).notes


def test_tables_from_other_programs(table, tmp_path):
    """Lines that end as on Windows and a byte order mark are read; other separators and encodings are told."""
    plain = table.read_text()
    (tmp_path / "windows.csv").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    assert read(tmp_path / "windows.csv").splits == read(table).splits
    (tmp_path / "folder").mkdir()
    shutil.copy(table, tmp_path / "folder" / "Train.CSV")
    assert read(tmp_path / "folder").splits == read(table).splits == read(tmp_path / "folder" / "Train.CSV").splits
    (tmp_path / "t.csv").write_text(plain.replace(",", ";"))
    with pytest.raises(
        ValueError, match=r"columns of .*t\.csv are separated by ';'; in a \.csv file they must be by ','"
    ):
        read(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(plain.replace("fine", "f\u00fcr").encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv cannot be read as csv \(UnicodeDecodeError.*; save it in UTF-8"):
        read(tmp_path / "t.csv")


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "x.jsonl").write_text("{not json")
    with pytest.raises(ValueError, match=r"x.jsonl cannot be read as json") as raised:
        read(tmp_path / "x.jsonl")
    assert "\n" not in str(raised.value)
    (tmp_path / "x.doc").write_text("")
    with pytest.raises(ValueError, match=r"x\.doc is not a table"):
        read(tmp_path / "x.doc")
