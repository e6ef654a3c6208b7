"""Tiny data sets in the layouts in which the papers' data are distributed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.support.masks import masked_folder

_TEXTS = ("the fine thing", "a cold thing here", "the great thing", "a broken thing")


def picture(path: Path, number: int) -> Path:
    """A small picture of noise, another for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")  # whatever the suffix: PIL reads by content
    return path


def cub(root: Path, train: int = 2, test: int = 1) -> Path:
    """CUB-200-2011 with three classes."""
    names = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 3: "003.Sooty_Albatross"}
    images, labels, training = [], [], []
    for label, name in names.items():
        for number in range(train + test):
            images.append(f"{len(images) + 1} {name}/{name}_{number}.jpg")
            labels.append(f"{len(images)} {label}")
            training.append(f"{len(images)} {int(number < train)}")
            picture(root / "images" / name / f"{name}_{number}.jpg", len(images))
    _write(root / "images.txt", images)
    _write(root / "image_class_labels.txt", labels)
    _write(root / "train_test_split.txt", training)
    _write(root / "classes.txt", [f"{label} {name}" for label, name in names.items()])
    return root


def nabirds(root: Path, test: int = 1) -> Path:
    """NABirds with two classes of birds among five of the hierarchy."""
    classes = {0: "Birds", 1: "Ducks", 295: "Common Eider (Adult)", 817: "Oak Titmouse", 1010: "Hawks"}
    images, labels, training = [], [], []
    for label in (817, 295):
        for number in range(2 + test):
            name = f"{label:04}-{number}"
            images.append(f"{name} {label:04}/{name.replace('-', '')}.jpg")
            labels.append(f"{name} {label}")
            training.append(f"{name} {int(number >= test)}")
            picture(root / "images" / f"{label:04}" / f"{name.replace('-', '')}.jpg", label + number)
    _write(root / "images.txt", images)
    _write(root / "image_class_labels.txt", labels)
    _write(root / "train_test_split.txt", training)
    _write(root / "classes.txt", [f"{label} {name}" for label, name in classes.items()])
    _write(root / "hierarchy.txt", ["1 0", "295 1", "817 0", "1010 0"])
    return root


def flowers(root: Path) -> Path:
    """Oxford Flowers 102 with three classes and twelve pictures."""
    for number in range(1, 13):
        picture(root / "jpg" / f"image_{number:05}.jpg", number)
    savemat(root / "imagelabels.mat", {"labels": np.array([[1 + number % 3 for number in range(12)]], np.uint8)})
    ids = {"trnid": [1, 2, 3, 4, 5, 6], "valid": [7, 8, 9], "tstid": [10, 11, 12]}
    savemat(root / "setid.mat", {name: np.array([numbers], np.uint16) for name, numbers in ids.items()})
    return root


def dogs(root: Path, lists: str = "") -> Path:
    """Stanford Dogs with two breeds."""
    breeds = {1: "n02085620-Chihuahua", 2: "n02085782-Japanese_spaniel"}
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        files = [(f"{breed}/{breed[:9]}_{number}.jpg", label) for label, breed in breeds.items() for number in numbers]
        for number, (file, _) in enumerate(files):
            picture(root / "Images" / file, number)
        cells = np.empty((len(files), 1), object)
        cells[:, 0] = [file for file, _ in files]
        (root / lists).mkdir(exist_ok=True)
        labels = np.array([[label] for _, label in files], np.uint8)
        savemat(root / lists / f"{split}_list.mat", {"file_list": cells, "labels": labels})
    return root


_CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")


def cars(root: Path) -> Path:
    """Stanford Cars in one piece: ``cars_annos.mat`` and ``car_ims/``."""
    rows = []
    for number in range(6):
        picture(root / "car_ims" / f"{number + 1:06}.jpg", number)
        rows.append((f"car_ims/{number + 1:06}.jpg", 1 + number % 2, int(number > 3)))
    annotations = np.array(rows, [("relative_im_path", object), ("class", object), ("test", object)])
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": np.array(_CARS, object)})
    return root


def cars_devkit(root: Path) -> Path:
    """Stanford Cars in several: ``devkit/``, ``cars_train/`` and ``cars_test/``."""
    files = {"train": root / "devkit/cars_train_annos.mat", "test": root / "cars_test_annos_withlabels.mat"}
    (root / "devkit").mkdir(parents=True)
    for split, count in (("train", 4), ("test", 2)):
        rows = [(f"{number + 1:05}.jpg", 1 + number % 2) for number in range(count)]
        for number, (name, _) in enumerate(rows):
            picture(root / f"cars_{split}" / name, number)
        savemat(files[split], {"annotations": np.array(rows, [("fname", object), ("class", object)])})
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(_CARS, object)})
    return root


def vpt(root: Path) -> Path:
    """The split of VPT, with classes that are not numbered from 0."""
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        labels = {f"{split}/{number}.jpg": 5 + 7 * (number % 2) for number in range(count)}
        for number, name in enumerate(labels):
            picture(root / "images" / name, number)
        (root / f"{split}.json").write_text(json.dumps(labels))
    return root


def vtab(root: Path, classes: int = 3) -> Path:
    """VTAB-1k with eight training, four validation and four test pictures; of many classes, most are not in it."""
    lines: dict[str, list[str]] = {}
    for split, count in (("train800", 8), ("val200", 4), ("test", 4)):
        for number in range(count):
            name = f"images/{split}/{number}.jpg"
            picture(root / name, number)
            lines.setdefault(split, []).append(f"{name} {(number + (split == 'test')) % min(classes, 4)}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, rows in lines.items():
        _write(root / f"{name}.txt", rows)
    return root


def cifar(root: Path, name: str = "CIFAR10") -> Path:
    """CIFAR-10 or CIFAR-100 as torchvision finds it; its checksums have to be switched off."""
    folder, kind, classes = {
        "CIFAR10": ("cifar-10-batches-py", "labels", 10),
        "CIFAR100": ("cifar-100-python", "fine_labels", 100),
    }[name]
    files = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"] if name == "CIFAR10" else ["train", "test"]
    count = classes if name == "CIFAR100" else 4
    (root / folder).mkdir(parents=True)
    for seed, file in enumerate(files):
        data = np.random.default_rng(seed).integers(0, 255, (count, 3072), dtype=np.uint8)
        labels = [(number + 4 * seed) % classes for number in range(count)]
        (root / folder / file).write_bytes(pickle.dumps({"data": data, kind: labels}))
    meta = {("label_names" if name == "CIFAR10" else "fine_label_names"): [f"class {n}" for n in range(classes)]}
    (root / folder / ("batches.meta" if name == "CIFAR10" else "meta")).write_bytes(pickle.dumps(meta))
    return root


def glue(root: Path, task: str, train: int = 8, test: int = 4) -> Path:
    """A task of GLUE in the files that GLUE distributes."""
    heads = {
        "cola": None,
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "rte": "index\tsentence1\tsentence2\tlabel",
    }
    root.mkdir(parents=True)
    for file, count in (("train.tsv", train), ("dev.tsv", test)):
        rows = [heads[task]] if heads[task] else []
        for number in range(count):
            first, second, label = _TEXTS[number % 4], f'"{_TEXTS[(number + 1) % 4]} as told', number % 2
            rows.append(
                {
                    "cola": f"gj04\t{label}\t{'' if label else '*'}\t{second}",
                    "mrpc": f"{label}\t{number}\t{number + 100}\t{first}\t{second}",
                    "rte": f"{number}\t{first}\t{second}\t{('entailment', 'not_entailment')[label]}",
                }[task]
            )
        _write(root / file, rows)
    return root


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def every(root: Path) -> Path:
    """A root with every data set of the papers, tiny, each in a folder that has a name of its own."""
    for write, name in ((cub, "CUB_200_2011"), (flowers, "flowers"), (dogs, "dogs"), (cars, "Cars")):
        write(root / name)
    nabirds(root / "nabirds", test=3)
    for name in ("caltech101", "dtd", "patch_camelyon", "eurosat", "clevr_count", "dsprites_loc"):
        vtab(root / "vtab-1k" / name)
    cifar(root / "CIFAR100", "CIFAR100")
    classes = ("n01440764", "n01443537", "n01484850")
    for folder, known, count in (
        ("imagenet/train", classes, 3), ("imagenet/val", classes, 1), ("imagenet-a", classes[:2], 2),
        ("imagenet-r", classes[1:], 2), ("imagenet-c/fog/1", classes, 2), ("imagenet-c/fog/2", classes, 2),
    ):  # fmt: skip
        for label, name in enumerate(known):
            for number in range(count):
                picture(root / folder / name / f"{number}.png", 10 * label + number)
    for task in ("cola", "mrpc", "rte"):
        glue(root / "glue" / task, task)
    masked_folder(root / "Kvasir-SEG", train=4, test=2)
    return root
