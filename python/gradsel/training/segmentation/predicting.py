"""Masks of images by the result of a run: as tensors, or as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gradsel.errors import RunError, expected
from gradsel.training.config import PathLike
from gradsel.training.data import Split
from gradsel.training.datasets import Images, collate, open_image
from gradsel.training.evaluation import predictions
from gradsel.training.folder import read_labels
from gradsel.training.recipe import precision_dtype
from gradsel.training.segmentation.datasets import transforms
from gradsel.training.segmentation.model import masks_of, resized
from gradsel.training.using import finished, image_paths, loaded_result, require_list


def predict_masks(folder: PathLike, images: Sequence[PathLike]) -> list[Tensor]:
    """Segments images.

    Args:
        folder: what :func:`gradsel.finetune` wrote for the task segmentation.
        images: paths.

    Returns:
        A mask [height, width] for each, bool, of the size of the image.

    Raises:
        RunError: the folder has no finished run, or one of another task; or an image cannot be read.
    """
    with expected():
        folder, config = finished(folder)
        if config.data.task != "segmentation":
            raise RunError(f"the run in {folder} is one of {config.data.task}, so it makes no masks")
        require_list(images)
        paths = image_paths(images)
        if not paths:
            return []
        sizes = [open_image(path).size for path in paths]
        model, loaded, device = loaded_result(folder, config, read_labels(folder), "masks")
    assert loaded.image is not None
    dataset = Images(Split(paths, [0] * len(paths)), transforms(loaded.image, config.data.augmentation)[1])
    logits, _ = predictions(
        model, dataset, collate(loaded), batch_size=config.recipe.batch_size, device=device,
        dtype=precision_dtype(config.precision), workers=config.data.workers, outputs=masks_of,
    )  # fmt: skip
    return [
        resized(logit, (height, width)).squeeze(0) > 0
        for logit, (width, height) in zip(logits.split(1), sizes, strict=True)
    ]


def write_masks(folder: PathLike, images: Sequence[PathLike], output: PathLike | None = None) -> list[Path]:
    """Segments images and writes their masks as PNG, white on black, by the names of the images.

    Args:
        output: where to; None: ``predictions`` in the folder of the run. Files there are replaced.

    Returns:
        The files, one for each image.

    Raises:
        RunError: as from :func:`predict_masks`; or two images have the same name.
    """
    from PIL import Image

    target = Path(folder) / "predictions" if output is None else Path(output)
    files = [target / f"{Path(image).stem}.png" for image in images]
    for number, file in enumerate(files):
        if file in files[:number]:
            raise RunError(
                f"two images are called {file.stem}, so that one mask would replace the other; predict them into "
                "different folders (--output)"
            )
    masks = predict_masks(folder, images)
    target.mkdir(parents=True, exist_ok=True)
    for file, mask in zip(files, masks, strict=True):
        Image.fromarray(mask.numpy()).save(file)
    return files
