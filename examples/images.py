"""Fine-tunes a vision model on a folder of images, tests the result and uses it.

    python examples/images.py birds/ timm/vit_base_patch16_224.augreg_in21k

Without arguments it makes a small data set, and a small model with random weights.
"""

import sys

import gradsel
from gradsel.training import Config

if len(sys.argv) > 2:
    settings = {"data": {"path": sys.argv[1]}, "model": {"name": sys.argv[2]}}
else:
    from made import images, small_vit

    settings = {"data": {"path": images("made/images")}, "model": small_vit()}

result = gradsel.finetune(
    Config.from_dict(
        {
            **settings,
            "method": {"name": "gps", "options": {"k": 1}},
            "recipe": {"epochs": 10, "learning_rate": 1e-2, "label_smoothing": 0.1},
            "output": {"folder": "runs/images"},
        }
    )
)

print(f"top-1 {result.metrics['top1']:.1f} %, {result.results['share']:.2f} % of the weights trained")
print(f"report: {result.folder / 'report.html'}")

# Later, in another process: the same numbers, and the classes of new images.
assert gradsel.evaluate("runs/images") == result.metrics
if len(sys.argv) > 3:
    print(gradsel.predict("runs/images", sys.argv[3:]))
