"""Fine-tunes a text classifier on a table with texts and their classes: whole rows, pulled to where they began (GRFT).

    python examples/texts.py reviews.csv distilbert/distilbert-base-uncased

Without arguments it makes a small table, and a small BERT with random weights.
"""

import sys

import gradsel
from gradsel.training import Config

if len(sys.argv) > 2:
    data, model = sys.argv[1:3]
else:
    from made import reviews, small_bert

    data, model = reviews("made/reviews.csv"), small_bert("made/bert")

result = gradsel.finetune(
    Config.from_dict(
        {
            "data": {"path": data},
            "model": {"name": model},
            "method": {"name": "grft", "options": {"rows": 3, "anchor": 1e-4, "anchor_blocks": 2}},
            "recipe": {"epochs": 20, "learning_rate": 1e-2, "batch_size": 16},
            "output": {"folder": "runs/texts"},
        }
    )
)

print(f"top-1 {result.metrics['top1']:.1f} %, {result.results['bytes']:,} bytes")
for text in ("a warm and funny film", "cold and broken"):
    [classes] = gradsel.predict(result.folder, [text])
    print(text, "->", ", ".join(f"{name} {100 * share:.0f} %" for name, share in classes))
