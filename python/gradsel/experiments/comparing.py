"""compare(): methods on one data set and one model, each with its best learning rate and over several seeds."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_callback import TrainerCallback

from gradsel.errors import RunError, expected
from gradsel.experiments.drawing import draw
from gradsel.experiments.tidy import Row, finals, row_of, settings_before, table_of, write_rows
from gradsel.methods import Method, method
from gradsel.training.config import Config, PathLike, read_config
from gradsel.training.data import read_data
from gradsel.training.folder import CONFIG, RESULTS, read_json, write_text
from gradsel.training.models import load_model
from gradsel.training.run import finetune, resume

#: Learning rates that are tried, as multiples of the one that a method proposes.
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
SETTINGS, ROWS, TABLE, PICTURE, RUNS = "compare.yaml", "results.csv", "table.md", "picture.png", "runs"


@dataclass(frozen=True)
class Contestant:
    """A method with its options, as ``gps:k=2:scope=net`` on the command line.

    Attributes:
        text: how it was written, which is its name in tables.
    """

    text: str
    how: Method

    @staticmethod
    def of(text: str) -> Contestant:
        """Reads it.

        Raises:
            RunError: there is no such method or option.
        """
        name, *given = text.split(":")
        options: dict[str, Any] = {}
        for part in given:
            key, equals, value = part.partition("=")
            if not equals:
                raise RunError(f"methods: {text!r} must be NAME:OPTION=VALUE:..., found {part!r}")
            options[key] = yaml.safe_load(value)
        return Contestant(text, method(name, **options))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        folder: where everything lies.
        rows: one for each run; see :class:`gradsel.experiments.tidy.Row`.
    """

    folder: Path
    rows: list[Row]

    def __str__(self) -> str:
        return table_of(self.rows)


def compare(
    config: Config, methods: Sequence[str], seeds: int = 3, factors: Sequence[float] = FACTORS, quiet: bool = False
) -> Comparison:
    """Fine-tunes a model by several methods, tests it, and writes rows, a table and a picture.

    For every method the same number of learning rates is tried, each by one run with the first seed, and the best one
    by the top-1 accuracy on the validation set is taken; the test set has no part in it. Where the data have no
    validation set, a fifth of the training set is one in these runs; the runs that count then train on all of it, with
    seeds ``config.seed``, ``config.seed + 1``, ... What is held out is the same in all runs.

    Called again with the same folder, it goes on where it stopped; methods and seeds may have been added.

    Args:
        config: as for :func:`gradsel.training.finetune`; its method and learning rate do not count.
        methods: names, with options after colons: ``["gps:k=2", "lora"]``.
        seeds: runs of every method that count.
        factors: what the learning rate that each method proposes is multiplied by; one factor: nothing is tried.
        quiet: print nothing.

    Raises:
        RunError: something does not fit, which is found before the first run; or the folder has another comparison.
    """
    with expected():
        config.require()
        contestants = [Contestant.of(text) for text in methods]
        if len({each.text for each in contestants}) < len(contestants) or not contestants:
            raise RunError(f"methods must be at least one, each once, got {', '.join(methods) or 'none'}")
        if type(seeds) is not int or seeds < 1:
            raise RunError(f"seeds must be an integer >= 1, got {seeds!r}")
        if not factors or not all(factor > 0 for factor in factors):
            raise RunError(f"factors must be positive numbers, got {list(factors)}")
        split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
        config = config.replaced({"data.split_seed": split_seed, "output.report": False, "output.keep": 1})
        _require_fit(config, contestants)
        folder = Path(config.output.folder)
        _require_same(folder, config, factors)

    rows: list[Row] = []
    for contestant in contestants:
        rates = sorted(contestant.how.rate * factor for factor in factors)
        best, note = rates[0], ""
        if len(rates) > 1:
            tried = [_validated(config, contestant, rate, folder, quiet) for rate in rates]
            rows += tried
            write_rows(folder / ROWS, rows)
            best, note = _best(contestant, tried)
        for seed in range(config.seed, config.seed + seeds):
            name = f"seed {seed}"
            result = run_or_continue(
                _config_of(config, contestant, best, seed, folder / RUNS / _slug(contestant) / _slug(name))
            )
            rows.append(row_of("test", contestant.text, contestant.how, result, best, seed, note))
            write_rows(folder / ROWS, rows)
            if not quiet:
                print(f"{contestant.text}, {name}: {rows[-1].value:.2f} %", file=sys.stderr)
    tried_text = (
        f"Every method: {len(factors)} learning rates on the validation set, one run each; then {seeds} seeds with the "
        f"best one. {config.recipe.epochs} epochs in each run.\n"
        if len(factors) > 1
        else f"Every method: its own learning rate, not tuned; {seeds} seeds, {config.recipe.epochs} epochs.\n"
    )
    write_text(folder / TABLE, f"{table_of(rows)}\n\n{tried_text}")
    draw(folder / PICTURE, finals(rows))
    return Comparison(folder, rows)


def _require_fit(config: Config, contestants: Sequence[Contestant]) -> None:
    """Refuses what some method would refuse hours later."""
    data = read_data(config.data, config.seed)
    loaded = load_model(config.model, data.classes, data.kind, config.seed, config.data.image_size)
    wrong = []
    for contestant in contestants:
        try:
            contestant.how.trained_on(loaded.model, loaded.head, loaded.parts)
        except ValueError as error:
            wrong.append(f"{contestant.text}: {error}")
    if wrong:
        raise RunError("; ".join(wrong))


def _require_same(folder: Path, config: Config, factors: Sequence[float]) -> None:
    """Writes down what is compared under, or checks it against what an earlier call wrote."""
    values = config.to_dict()
    del values["method"], values["output"]
    values["recipe"].pop("learning_rate")
    values = {**values, "factors": [float(factor) for factor in factors]}
    before = settings_before(folder / SETTINGS, values, "output.folder")
    if before and (different := [name for name in values if before.get(name) != values[name]]):
        raise RunError(f"output.folder: {folder} has a comparison with other settings of {', '.join(different)}")


def _config_of(config: Config, contestant: Contestant, rate: float, seed: int, folder: PathLike) -> Config:
    how = contestant.how
    options = {name: value for name, value in how.options().items() if value is not None}
    changes = {
        "method.name": how.name,
        "method.options": options,
        "recipe.learning_rate": rate,
        "seed": seed,
        "output.folder": str(folder),
    }
    return config.replaced({"method.options": {}}).replaced(changes)


def _validated(config: Config, contestant: Contestant, rate: float, folder: Path, quiet: bool) -> Row:
    """One learning rate on the validation set. A run that diverges counts as one, and scores nothing."""
    if config.data.validation_holdout is None:
        config = config.replaced({"data.validation_holdout": 0.2})
    own = folder / RUNS / _slug(contestant) / f"rate-{rate:.3g}"
    how = contestant.how
    try:
        result = run_or_continue(_config_of(config, contestant, rate, config.seed, own))
        scores = [entry["eval_top1"] for entry in result["history"] if "eval_top1" in entry]
        row = row_of("validation", contestant.text, how, result, rate, config.seed, "", max(scores))
    except ValueError as error:  # a result that is not finite is not saved
        note = " ".join(str(error).split())
        row = row_of("validation", contestant.text, how, {}, rate, config.seed, note, math.nan)
    if not quiet:
        print(f"{contestant.text}, learning rate {rate:.3g}: {row.value:.2f} % of the validation set", file=sys.stderr)
    return row


def _best(contestant: Contestant, tried: Sequence[Row]) -> tuple[float, str]:
    """The best learning rate, the lowest of equal ones, and a note if it is the first or the last that was tried."""
    finite = [row for row in tried if not math.isnan(row.value)]
    if not finite:
        raise RunError(f"{contestant.text}: no learning rate gave a result; the last said: {tried[-1].note}")
    best = max(finite, key=lambda row: (row.value, -row.learning_rate))
    edge = best.learning_rate in (tried[0].learning_rate, tried[-1].learning_rate)
    return best.learning_rate, "the best learning rate is at the end of those tried" if edge else ""


def run_or_continue(config: Config, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """The results of a run, which is begun, continued or read, whichever it needs.

    Args:
        callbacks: of transformers' Trainer.

    Raises:
        ValueError: its folder has a run with another recipe.
    """
    folder = Path(config.output.folder)
    if (folder / CONFIG).is_file():
        with expected():
            before = read_config(folder / CONFIG).recipe
        if before != config.recipe:
            raise RunError(f"the run in {folder} was begun with another recipe; remove it to begin anew")
        if (folder / RESULTS).is_file():
            found: dict[str, Any] = read_json(folder / RESULTS)
            return found
        return resume(folder, callbacks=callbacks, quiet=True).results
    if folder.exists():  # stopped before it had begun
        shutil.rmtree(folder)
    return finetune(config, callbacks=callbacks, quiet=True).results


def _slug(name: Contestant | str) -> str:
    text = name.text if isinstance(name, Contestant) else name
    return "".join(letter if letter.isalnum() or letter in "-_=." else "-" for letter in text)
