"""compare(): methods on one data set and one model, each with its best learning rate and over several seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gradsel.errors import RunError, expected, one_line
from gradsel.experiments.drawing import draw
from gradsel.experiments.tidy import Row, finals, folder_of_runs, read_rows, row_of, table_of, write_rows
from gradsel.experiments.working import Start, workers
from gradsel.methods import Method, method
from gradsel.training.changed import difference, fingerprint
from gradsel.training.config import Config, PathLike
from gradsel.training.data import Data, hold_out, read_data
from gradsel.training.folder import write_text
from gradsel.training.models import load_model

#: Learning rates that are tried, as multiples of the one that a method proposes.
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
SETTINGS, ROWS, TABLE, PICTURE, RUNS = "compare.yaml", "results.csv", "table.md", "picture.png", "runs"
#: The share of the training set by which learning rates are chosen, where the data have no validation set.
HOLDOUT = 0.2
#: In the settings: the fingerprint of the data.
SAMPLES = "samples"


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
        rows: one for each run in the folder, those of earlier calls included; see
            :class:`gradsel.experiments.tidy.Row`.
        earlier: the methods of earlier calls that this one did not name.
    """

    folder: Path
    rows: list[Row]
    earlier: Sequence[str] = ()

    def __str__(self) -> str:
        tested = finals(self.rows)
        lines = [table_of(self.rows)]
        for text, names in (
            ("From earlier calls", [name for name in self.earlier if name in tested]),
            ("From earlier calls, without a result", [name for name in self.earlier if name not in tested]),
        ):
            lines += [f"{text}: {', '.join(names)}."] if names else []
        return "\n\n".join(lines)


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: int = 3,
    factors: Sequence[float] = FACTORS,
    quiet: bool = False,
    jobs: int = 1,
) -> Comparison:
    """Fine-tunes a model by several methods, tests it, and writes rows, a table and a picture.

    For every method the same number of learning rates is tried, each by one run with the first seed, and the best one
    by the top-1 accuracy on the validation set is taken; the test set has no part in it. Where the data have no
    validation set, a fifth of the training set is one in these runs; the runs that count then train on all of it, with
    seeds ``config.seed``, ``config.seed + 1``, ... What is held out is the same in all runs. Where the data have one,
    the best of the runs that were tried is the first that counts, as it would be repeated to the bit.

    Called again with the same folder, it goes on where it stopped; methods and seeds may be others. Rows and table are
    those of all calls. Remove a method's folder in ``runs/`` to be rid of its rows.

    Args:
        config: as for :func:`gradsel.training.finetune`; its method and learning rate do not count.
        methods: names, with options after colons: ``["gps:k=2", "lora"]``.
        seeds: runs of every method that count.
        factors: what the learning rate that each method proposes is multiplied by; one factor: nothing is tried.
        quiet: print nothing.
        jobs: runs at a time, each of several in a process of its own with as many threads as this one and a model of
            its own. The results are the same but for the time of a step.

    Raises:
        RunError: something does not fit, which is found before the first run; the folder has another comparison, or
            another process is at work in it; or methods failed, after all others.
    """
    with expected():
        config.require()
        if config.data.task == "segmentation":
            raise RunError("data.task is segmentation, but only classifiers are compared; pass each method to finetune")
        contestants = [Contestant.of(text) for text in methods]
        if len({each.text for each in contestants}) < len(contestants) or not contestants:
            raise RunError(f"methods must be at least one, each once, got {', '.join(methods) or 'none'}")
        if len({_slug(each.text) for each in contestants}) < len(contestants):
            raise RunError(f"methods: two of {', '.join(methods)} have the same folder; leave out blanks in options")
        for name, number in (("seeds", seeds), ("jobs", jobs)):
            if type(number) is not int or number < 1:
                raise RunError(f"{name} must be an integer >= 1, got {number!r}")
        if not factors or not all(factor > 0 for factor in factors):
            raise RunError(f"factors must be positive numbers, got {list(factors)}")
        split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
        config = config.replaced({"data.split_seed": split_seed, "output.report": False, "output.keep": 1})
        data = _require_fit(config, contestants, len(factors) > 1)
        values, found = _settings(config, factors), fingerprint(data, config.data.path)
    folder = Path(config.output.folder)
    with folder_of_runs(folder / SETTINGS, {**values, SAMPLES: found}, "output.folder") as before:
        if before and (different := [name for name in values if before.get(name) != values[name]]):
            raise RunError(f"output.folder: {folder} has a comparison with other settings of {', '.join(different)}")
        if before and (told := difference(before.get(SAMPLES, found), found)):
            raise RunError(
                f"data.path: {config.data.path} has changed since the comparison in {folder} began: {told}; put the "
                "data back, or begin anew with another --output"
            )
        return _compared(config, contestants, seeds, factors, quiet, jobs, "validation" in data.splits)


def _compared(
    config: Config, contestants: Sequence[Contestant], seeds: int, factors: Sequence[float], quiet: bool, jobs: int,
    apart: bool,
) -> Comparison:  # fmt: skip
    folder = Path(config.output.folder)
    rows = [row for row in read_rows(folder / ROWS, "output.folder") if _folder_of(folder, row.method).is_dir()]
    order = list(dict.fromkeys([*(row.method for row in rows), *(each.text for each in contestants)]))
    failed: dict[str, str] = {}

    def finish(each: Contestant, started: Sequence[_Started]) -> list[Row]:
        done = []
        for run in started:
            try:
                found = run.row()
            except ValueError as error:  # the other runs go on
                failed[each.text] = told = f"{run} failed, {one_line(error)}"
            else:
                done.append(found)
                rows[:] = sorted(
                    [*(row for row in rows if row.run != found.run), found],
                    key=lambda row: (order.index(row.method), row.split == "test", row.seed, row.learning_rate),
                )
                write_rows(folder / ROWS, rows)
                told = f"{run}: {found.note}" if math.isnan(found.value) else f"{run}: {found.value:.2f} %"
            if not quiet:
                print(f"{each.text}, {told}", file=sys.stderr)
        return done

    with workers(jobs) as start:
        rates = {each.text: sorted(each.how.rate * factor for factor in factors) for each in contestants}
        searches: dict[str, list[_Started]] = {each.text: [] for each in contestants}
        if len(factors) > 1:
            for each in contestants:
                searches[each.text] = [_try(config, each, rate, folder, start) for rate in rates[each.text]]
        tests: list[tuple[Contestant, list[_Started]]] = []
        for each in contestants:
            best, note = rates[each.text][0], ""
            if searches[each.text]:
                try:
                    best, note = _best(finish(each, searches[each.text]))
                except RunError as error:
                    failed[each.text] = one_line(error)
                    continue
            own = [
                _test(config, each, best, seed, folder, note, apart and bool(searches[each.text]), start)
                for seed in range(config.seed, config.seed + seeds)
            ]
            tests.append((each, own))
            if jobs == 1:
                finish(each, own)
        if jobs > 1:
            for each, own in tests:
                finish(each, own)
    found = Comparison(folder, rows, [name for name in order if name not in {each.text for each in contestants}])
    tried_text = (
        f"Every method: {len(factors)} learning rates on the validation set, one run each; then the seeds, with the "
        f"best one. {config.recipe.epochs} epochs in each run.\n"
        if len(factors) > 1
        else f"Every method: its own learning rate, not tuned; {config.recipe.epochs} epochs in each run.\n"
    )
    lacking = "".join(f"\nNo result, or not all of its seeds: {name}: {why}.\n" for name, why in failed.items())
    write_text(folder / TABLE, f"{found}\n\n{tried_text}{lacking}")
    if finals(rows):
        draw(folder / PICTURE, finals(rows))
    if failed:
        said = "; ".join(f"{name}: {why}" for name, why in failed.items())
        others = f"; {folder / TABLE} has the others" if len(failed) < len(contestants) else ""
        raise RunError(f"{len(failed)} of {len(contestants)} methods failed ({said}){others}")
    return found


def _require_fit(config: Config, contestants: Sequence[Contestant], tuned: bool) -> Data:
    """Reads the data, and refuses what some method would refuse hours later.

    Args:
        tuned: learning rates are tried, for which there has to be a validation set.
    """
    data = read_data(config.data, config.seed)
    if tuned and "validation" not in data.splits:
        fraction = config.data.validation_holdout or HOLDOUT
        if not hold_out(data.splits["train"], fraction, 0)[1].labels:
            raise RunError(
                "data: no class has a second training sample that could be kept for validation, by which learning "
                "rates are chosen; pass --factors 1, which chooses none"
            )
    loaded = load_model(config.model, data.classes, data.kind, config.seed, config.data.image_size)
    wrong = []
    for contestant in contestants:
        try:
            contestant.how.trained_on(loaded.model, loaded.head, loaded.parts)
        except ValueError as error:
            wrong.append(f"{contestant.text}: {error}")
    if wrong:
        raise RunError("; ".join(wrong))
    return data


def _settings(config: Config, factors: Sequence[float]) -> dict[str, Any]:
    """What is compared under, which has to be the same in every call with a folder."""
    values = config.to_dict()
    del values["method"], values["output"]
    values["recipe"].pop("learning_rate")
    return {**values, "factors": [float(factor) for factor in factors]}


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


@dataclass(frozen=True)
class _Started:
    """A run that has been started, or will be when its row is asked for."""

    text: str
    row: Callable[[], Row]

    def __str__(self) -> str:
        return self.text


def _try(config: Config, contestant: Contestant, rate: float, folder: Path, start: Start) -> _Started:
    """One learning rate on the validation set. A run that diverges counts as one, and scores nothing."""
    if config.data.validation_holdout is None:
        config = config.replaced({"data.validation_holdout": HOLDOUT})
    own = _folder_of(folder, contestant.text, _of_rate(rate))
    how = contestant.how
    results = start(_config_of(config, contestant, rate, config.seed, own))

    def row() -> Row:
        try:
            found = results()
            scores = [entry["eval_top1"] for entry in found["history"] if "eval_top1" in entry]
            return row_of("validation", contestant.text, how, found, rate, config.seed, "", max(scores))
        except ValueError as error:  # a result that is not finite is not saved
            note = " ".join(str(error).split())
            return row_of("validation", contestant.text, how, {}, rate, config.seed, note, math.nan)

    return _Started(f"learning rate {rate:.3g} on the validation set", row)


def _test(
    config: Config, contestant: Contestant, rate: float, seed: int, folder: Path, note: str, tried: bool, start: Start
) -> _Started:
    """A run that counts.

    Args:
        tried: that of the first seed is the one by which the rate was tried.
    """
    name = f"seed {seed}"
    own = _folder_of(folder, contestant.text, _of_rate(rate) if tried and seed == config.seed else name)
    results = start(_config_of(config, contestant, rate, seed, own))
    return _Started(name, lambda: row_of("test", contestant.text, contestant.how, results(), rate, seed, note))


def _of_rate(rate: float) -> str:
    return f"rate-{rate:.3g}"


def _best(tried: Sequence[Row]) -> tuple[float, str]:
    """The best learning rate, the lowest of equal ones, and a note if it is the first or the last that was tried, or if
    some gave no result."""
    finite = [row for row in tried if not math.isnan(row.value)]
    if not finite:
        raise RunError(f"no learning rate gave a result; the last said: {tried[-1].note}")
    best = max(finite, key=lambda row: (row.value, -row.learning_rate))
    edge = best.learning_rate in (tried[0].learning_rate, tried[-1].learning_rate)
    notes = ["the best learning rate is at the end of those tried"] if edge else []
    if len(finite) < len(tried):
        notes.append(f"{len(tried) - len(finite)} of {len(tried)} learning rates gave no result")
    return best.learning_rate, "; ".join(notes)


def _folder_of(folder: Path, method: str, *name: str) -> Path:
    """The folder of a method's runs, or of one of them."""
    return folder.joinpath(RUNS, _slug(method), *map(_slug, name))


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_=.+" else "-" for letter in name)
