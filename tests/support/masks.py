"""Made images with masks, a tiny SAM on disk, and configurations of runs with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from gradsel.training import Config

#: A SAM of 64 x 64 pixels with two blocks, one of them with windows.
SAM = {
    "vision_config": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_ratio": 2.0,
        "initializer_range": 0.1,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}  # fmt: skip


def sam_folder(root: Path) -> Path:
    """A tiny SAM as transformers saves it."""
    torch.manual_seed(5)
    transformers.SamModel(transformers.SamConfig(**SAM)).save_pretrained(root)
    return root


def ellipse(root: Path, name: str, drawn: np.random.Generator, height: int = 60, width: int = 72) -> None:
    """A bright ellipse on noise, ``root/images/name.jpg``, and its mask, ``root/masks/name.jpg``, as in Kvasir-SEG."""
    rows, columns = np.mgrid[:height, :width]
    centre, radii = drawn.uniform(0.35, 0.65, 2) * (height, width), drawn.uniform(0.2, 0.3, 2) * (height, width)
    inside = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
    pixels = drawn.integers(0, 90, (height, width, 3)) + 150 * inside[..., None]
    for folder, shown in (("images", pixels), ("masks", np.where(inside, 255, 0))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(shown.astype(np.uint8)).save(root / folder / f"{name}.jpg", quality=95)


def masked_folder(root: Path, **sizes: int) -> Path:
    """Ellipses in ``root/split/{images,masks}``; without sizes in ``root/{images,masks}``."""
    drawn = np.random.default_rng(0)
    for split, count in (sizes or {"": 10}).items():
        for number in range(count):
            ellipse(root / split, f"{split}{number}", drawn)
    return root


def mask_run(data: Path, model: Path, output: Path, **changes: Any) -> Config:
    """A run of a tiny SAM; changes by dotted names with ``__`` for the dot."""
    values = {
        "data": {"path": str(data), "task": "segmentation", "augmentation": "flip"},
        "model": {"name": str(model)},
        "recipe": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2},
        "output": {"folder": str(output), "report": False},
        "device": "cpu",
    }
    return Config.from_dict(values).replaced({name.replace("__", "."): value for name, value in changes.items()})
