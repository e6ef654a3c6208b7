"""The model card: README.md of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradsel.training.config import Config
from gradsel.training.folder import write_text


def write_card(folder: Path, config: Config, results: dict[str, Any]) -> None:
    """Writes README.md: metadata as the hub reads them, what was trained and how, its metrics, how to use it."""
    metrics = results["metrics"]
    images = results["kind"] == "images"
    metadata = {
        "base_model": config.model.name,
        "library_name": "gradsel",
        "pipeline_tag": "image-classification" if images else "text-classification",
        "tags": ["gradsel", results["method"]["name"]],
        "metrics": [{"type": "accuracy", "value": round(metrics["top1"] / 100, 6)}],
    }
    rows = [("top-1", f"{metrics['top1']:.2f} %")]
    if "top5" in metrics:
        rows.append(("top-5", f"{metrics['top5']:.2f} %"))
    rows += [
        ("F1, macro average", f"{metrics['f1']:.2f} %"),
        ("test samples", f"{metrics['samples']:,}"),
        ("trained parameters", f"{results['trained']:,} of {results['parameters']:,} ({results['share']:.3f} %)"),
        ("size of the result", f"{results['bytes']:,} bytes (the whole model: {results['bytes_of_full_model']:,})"),
        ("selection, training", f"{results['seconds']['selection']:.1f} s, {results['seconds']['training']:.1f} s"),
    ]
    options = ", ".join(
        f"{name} {value}" for name, value in results["method"].items() if name != "name" and value is not None
    )
    example = "image.png" if images else "'a text'"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {config.model.name}, fine-tuned on {Path(config.data.path).name}

{results["classes"]} classes. Method: {results["method"]["name"]}{f" ({options})" if options else ""}. This folder
holds what fine-tuning changed, not the model itself.

| | |
|---|---|
{table}

## Use

```sh
gradsel predict {folder.name} {example}
gradsel evaluate {folder.name}
```

`config.yaml` repeats the run: `gradsel finetune --config config.yaml --output NEW`.
"""
    write_text(folder / "README.md", text)
