"""The model card: README.md of a result, with the metadata that model hubs read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gradsel.training.config import Config
from gradsel.training.costs import duration, size
from gradsel.training.folder import write_text
from gradsel.training.task import Task

#: Classes up to which a card lists their names.
_NAMED = 30


def write_card(folder: Path, config: Config, results: dict[str, Any], task: Task) -> None:
    """Writes README.md: metadata as hubs read them, how to use the result, its metrics, what was trained on which data.

    Args:
        results: what results.json will say.
    """
    example = "a text" if results["kind"] == "texts" else "photo.jpg"
    given = f'"{example}"' if results["texts"] != 2 else '("first text", "second text")'
    place = shlex.quote(folder.name)
    asked = f"'{example}'" if results["texts"] != 2 else "--pair 'first text' 'second text'"
    write_text(
        folder / "README.md",
        f"""---
{_metadata(config, results, task)}
---

# {_title(config)}

{task.summary(results)}
This folder holds what fine-tuning changed, {size(results["bytes"])}. The model that it began with is loaded by name,
`{config.model.name}`.

## Use

```sh
pip install 'gradsel-kernels[finetune]'
gradsel predict {place} {asked}
```

```python
import gradsel

{task.example(folder.name, given)}
```

## Results

| | |
|---|---|
{_table(_numbers(results, task))}

`gradsel evaluate {place}` measures them again. `results.json` has all of them, `report.html` shows them.

## Data

{_data(config, results)}

## Training

{_training(config, results)}

`gradsel finetune --config {place}/config.yaml --output NEW` repeats the run.
""",
    )


def _title(config: Config) -> str:
    return f"{config.model.name.rstrip('/').rpartition('/')[2]}, fine-tuned on {config.data.name}"


def _metadata(config: Config, results: dict[str, Any], task: Task) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    pipeline, found = task.pipeline(results["kind"]), task.hub_metrics(results["metrics"])
    data = config.data.name
    card = ModelCardData(
        base_model=_hub_id(config.model.name),
        library_name="gradsel",
        pipeline_tag=pipeline,
        tags=["gradsel", results["method"]["name"]],
        metrics=list(found),
        model_name=_title(config),
        eval_results=[
            EvalResult(
                task_type=pipeline, dataset_type=data, dataset_name=data, dataset_split="test",
                metric_type=name, metric_value=round(value, 6),
            )
            for name, value in found.items()
        ],
    )  # fmt: skip
    text: str = card.to_yaml()
    return text


def _hub_id(name: str) -> str | None:
    """What the hub calls the model: timm's are in a namespace of that name; None for a local folder."""
    if Path(name).exists():
        return None
    return name if "/" in name else f"timm/{name}"


def _numbers(results: dict[str, Any], task: Task) -> list[tuple[str, str]]:
    seconds = results["seconds"]
    return [
        *task.rows(results["metrics"]),
        ("trained parameters", f"{results['trained']:,} of {results['parameters']:,} ({results['share']:.3g} %)"),
        ("size of the result", f"{size(results['bytes'])} (the whole model: {size(results['bytes_of_full_model'])})"),
        ("selection and training", f"{duration(seconds['selection'])} and {duration(seconds['training'])}, "
                                   f"{results['steps']:,} steps on {results['device']}"),
    ]  # fmt: skip


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _data(config: Config, results: dict[str, Any]) -> str:
    counts = ", ".join(f"{count:,} for {name}" for name, count in results["samples"].items())
    names = list(results["metrics"].get("per_class", ("background", "foreground")))
    more = f", ... ({len(names)} in all)" if len(names) > _NAMED else ""
    listed = ", ".join(name.replace("|", "\\|").replace("<", "&lt;") for name in names[:_NAMED])
    return f"`{config.data.name}`: {counts}.\nClasses: {listed}{more}."


def _training(config: Config, results: dict[str, Any]) -> str:
    method = dict(results["method"])
    name = method.pop("name")
    options = ", ".join(f"{key} {value}" for key, value in method.items() if value is not None)
    recipe = config.recipe
    rate = "the method's default rate" if recipe.learning_rate is None else f"peak rate {recipe.learning_rate:g}"
    return (
        f"Method `{name}`{f' ({options})' if options else ''}. {recipe.epochs} epochs, batches of {recipe.batch_size}, "
        f"{recipe.optimizer}, {rate}, seed {config.seed}, {config.precision}."
    )
