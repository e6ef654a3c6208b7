"""Fine-tunes SAM to segment one kind of thing without prompts, from images with masks, and draws what it predicts.

    python examples/segmentation.py Kvasir-SEG/ facebook/sam-vit-base

Without arguments it makes images with bright ellipses, and a small SAM with random weights.
"""

import sys
from pathlib import Path

from PIL import Image

import gradsel
from gradsel.training import Config, predict_masks

if len(sys.argv) > 2:
    data, model = sys.argv[1:3]
else:
    from made import masked_images, small_sam

    data, model = masked_images("made/ellipses"), small_sam("made/sam")

result = gradsel.finetune(
    Config.from_dict(
        {
            "data": {"task": "segmentation", "path": data, "augmentation": "flip"},
            "model": {"name": model},
            "method": {"name": "gps", "options": {"k": 1}},
            "recipe": {"epochs": 10, "batch_size": 2, "learning_rate": 3e-3, "warmup_epochs": 0},
            "output": {"folder": "runs/segmentation"},
        }
    )
)

print(f"mDice {result.metrics['mdice']:.1f} %, mIoU {result.metrics['miou']:.1f} %")
print(f"report, with predictions beside the truth: {result.folder / 'report.html'}")

# A mask of the size of the image, as a black and white picture.
image = next(path for path in sorted(Path(data).rglob("images/*")) if path.is_file())
[mask] = predict_masks(result.folder, [image])
Image.fromarray(mask.numpy()).save("runs/mask.png")
