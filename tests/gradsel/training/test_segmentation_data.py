"""Images with masks: layouts, lists, held-out images, and what is refused before any training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradsel.training import DataConfig
from gradsel.training.data import Split
from gradsel.training.models import ImageInput
from gradsel.training.segmentation.data import read_mask, read_masks
from gradsel.training.segmentation.datasets import MaskedImages, collate, transforms
from tests.support import masks

INPUT = ImageInput((64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


def read(path, **settings):
    return read_masks(DataConfig(path=str(path), task="segmentation", **settings), seed=1)


def names(split):
    images, found = ([Path(path).stem for path in paths] for paths in split)
    assert images == found
    return set(images)


@pytest.fixture
def folder(tmp_path):
    return masks.masked_folder(tmp_path / "data")


def test_images_are_held_out_as_the_seed_says(folder):
    (folder / "kavsir_bboxes.json").write_text("{}")
    (folder / "images" / "Thumbs.db").write_text("")
    data = read(folder)
    assert (data.kind, data.classes) == ("masks", ["background", "foreground"])
    train, test = names(data.splits["train"]), names(data.splits["test"])
    assert (len(train), len(test)) == (8, 2)
    assert not train & test
    assert data.splits == read(folder).splits
    assert data.notes == ["the data have no test set: 2 samples are held out, with seed 1"]


def test_lists_of_names(folder):
    (folder / "train.txt").write_text("\n".join(map(str, range(6))) + "\n\n")
    (folder / "val.txt").write_text("6.jpg\nimages/7.jpg\n")
    data = read(folder)
    assert {name: names(split) for name, split in data.splits.items()} == {
        "train": set("012345"),
        "test": {"6", "7"},  # the only other set
    }
    assert data.notes == ["left out: 2 images are in no list: 8, 9"]
    (folder / "test.txt").write_text("8\n9")
    assert names(read(folder).splits["validation"]) == {"6", "7"}
    (folder / "test.txt").write_text("5\n6\n8\nbirds\n")
    with pytest.raises(ValueError, match=r"1 names in .*test\.txt are those of no image: birds"):
        read(folder)
    (folder / "test.txt").write_text("5\n8")
    with pytest.raises(ValueError, match=r"1 images are in train and test both: 5"):
        read(folder)
    (folder / "train.txt").unlink()
    with pytest.raises(ValueError, match=r"has val\.txt, test\.txt, but none for training"):
        read(folder)


def test_folders_for_training_and_testing(tmp_path):
    masks.masked_folder(tmp_path, train=3, val=1, test=2)
    sizes = {name: len(split.labels) for name, split in read(tmp_path).splits.items()}
    assert sizes == {"train": 3, "validation": 1, "test": 2}
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="has val, test, but none for training"):
        read(tmp_path)


def save(path, levels, mode=None):
    Image.fromarray(np.asarray(levels, dtype=np.uint8), mode).save(path)


def test_what_is_wrong_is_named_and_counted(folder, tmp_path):
    (folder / "images" / "3.jpg").write_bytes(b"no image")
    whole = (folder / "masks" / "4.jpg").read_bytes()
    (folder / "masks" / "4.jpg").write_bytes(whole[: len(whole) // 2])
    save(folder / "masks" / "5.jpg", np.full((72, 60), 255))
    save(folder / "masks" / "6.jpg", np.full((60, 72), 90))
    with pytest.raises(
        ValueError, match=r"2 files cannot be read: .*3\.jpg, .*4\.jpg; pass --skip-unreadable"
    ) as raised:
        read(folder)
    assert "1 masks have another size than their image: 5.jpg (60 x 72, not 72 x 60)" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"^data: 1 masks have another size"):
        read(folder, skip_unreadable=True)
    masks.ellipse(folder, "5", np.random.default_rng(1))
    data = read(folder, skip_unreadable=True)
    assert names(data.splits["train"]) | names(data.splits["test"]) == set("01256789")
    assert data.notes[0].startswith("left out: 2 files cannot be read")
    assert data.notes[1] == "1 masks of the train set are empty, without a gray level above 127: 6.jpg"


def test_what_does_not_belong_together(folder):
    (folder / "images" / "9.jpg").rename(folder / "images" / "10.jpg")
    with pytest.raises(
        ValueError, match=r"1 images have no mask of the same name: 10\.jpg; 1 masks have no image.*9\.jpg"
    ):
        read(folder)
    (folder / "images" / "10.jpg").rename(folder / "images" / "9.jpg")
    save(folder / "masks" / "9.png", np.zeros((60, 72)))
    with pytest.raises(ValueError, match=r"9\.jpg and 9\.png in .*masks have the same name"):
        read(folder)
    (folder / "masks").rename(folder / "labels")
    with pytest.raises(ValueError, match=r"has no folder masks$"):
        read(folder)
    with pytest.raises(ValueError, match="is a file; a folder with images/ and masks/ is expected"):
        read(folder / "images" / "9.jpg")


def test_nothing_to_learn(tmp_path):
    masks.masked_folder(tmp_path, train=2, test=1)
    save(tmp_path / "test" / "masks" / "test0.jpg", np.zeros((60, 72)))
    with pytest.raises(ValueError, match=r"1 masks of the test set are empty.*: test0\.jpg; these are all there are"):
        read(tmp_path)
    for file in (tmp_path / "train" / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"there are no images in .*train/images"):
        read(tmp_path)


def test_gray_levels(tmp_path):
    save(tmp_path / "gray.png", [[0, 127, 128, 255]])
    save(tmp_path / "index.png", [[0, 1, 1, 0]])
    save(tmp_path / "colours.png", [[[0, 0, 0], [255, 255, 255]]])
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    found = {name: read_mask(tmp_path / f"{name}.png").tolist() for name in ("gray", "index", "colours", "bits")}
    assert found == {"gray": [[0, 0, 1, 1]], "index": [[0, 1, 1, 0]], "colours": [[0, 1]], "bits": [[1, 0]]}


@pytest.mark.parametrize("augmentation", ["crop", "flip", "none"])
def test_images_and_masks_are_augmented_together(augmentation, tmp_path):
    levels = np.zeros((48, 80), dtype=np.uint8)
    levels[10:30, 5:50] = 255
    save(tmp_path / "mask.png", levels)
    save(tmp_path / "image.png", np.repeat(levels[..., None], 3, 2))
    training, testing = transforms(INPUT, augmentation)
    split = Split([str(tmp_path / "image.png")] * 8, [str(tmp_path / "mask.png")] * 8)
    data = MaskedImages(split, training, seed=3)
    batch = collate([data[number] for number in range(8)])
    assert (batch["pixel_values"].shape, batch["labels"].shape) == ((8, 3, 64, 64), (8, 64, 64))
    assert (batch["labels"].dtype, type(batch["labels"])) == (torch.uint8, torch.Tensor)
    bright = (batch["pixel_values"][:, 0] > 0).to(torch.uint8)
    assert (bright == batch["labels"]).float().mean() > 0.97  # they differ along edges, where images are interpolated
    different = {tuple(mask.flatten().tolist()) for mask in batch["labels"]}
    assert len(different) == {"crop": 8, "flip": 2, "none": 1}[augmentation]
    assert all(torch.equal(data[2][name], batch[name][2]) for name in batch)
    data.epoch = 1
    again = torch.stack([data[number]["labels"] for number in range(8)])
    assert torch.equal(again, batch["labels"]) == (augmentation == "none")
    whole = MaskedImages(split, testing)[0]["labels"]
    assert whole.float().mean() == pytest.approx((levels > 0).mean(), abs=0.03)
