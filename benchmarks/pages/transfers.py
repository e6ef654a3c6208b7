"""Tables and sentences about two real transfers, from ``transfers-cpu.csv`` and ``transfers-cost-cpu.csv``."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from scipy.stats import t

from benchmarks.harness.results import Row, load
from benchmarks.pages.figures import bullets, counted, megabytes, paragraph, table, where
from benchmarks.transfers.cost import NOTHING
from benchmarks.transfers.data import DIGITS, REVIEWS, SIZES
from benchmarks.transfers.plan import ALL_INPUTS, CHANCE, ENTROPY, HALF, KS, RANKS, SEARCH, SEEDS, TABLE, of_k

NAMES = {REVIEWS: "Film reviews, MiniLM", DIGITS: "Digits, EfficientNet-Lite0"}
LORA = "lora"
NOT_YET = "Not run yet; the first command above does."
CLASSES = {REVIEWS: 2, DIGITS: 10}


class Transfers:
    """The rows by transfer and method."""

    def __init__(self, results: Path) -> None:
        self.path = results / "transfers-cpu.csv"
        self.rows = load(self.path)
        self.costs = {(row["transfer"], row["method"]): row for row in load(results / "transfers-cost-cpu.csv")}

    def tests(self, transfer: str, method: str) -> list[Row]:
        """The runs that count, in the order of their seeds.

        Raises:
            ValueError: there are none.
        """
        found = [
            row for row in self.rows if (row["transfer"], row["method"], row["split"]) == (transfer, method, "test")
        ]
        if not found:
            raise ValueError(f"{self.path.name} has no {transfer}, {method}; run python -m benchmarks.transfers")
        return sorted(found, key=lambda row: int(row["seed"]))

    def validated(self, transfer: str, method: str) -> float:
        """The accuracy on the validation set at the best learning rate."""
        return max(
            value
            for row in self.rows
            if (row["transfer"], row["method"], row["split"]) == (transfer, method, "validation")
            and not math.isnan(value := float(row["value"]))
        )

    def there(self, transfer: str, methods: Iterable[str]) -> list[str]:
        """Those of the methods that have a run with every seed."""
        seeds: dict[str, set[str]] = {}
        for row in self.rows:
            if (row["transfer"], row["split"]) == (transfer, "test"):
                seeds.setdefault(row["method"], set()).add(row["seed"])
        return [method for method in methods if len(seeds.get(method, ())) >= SEEDS]

    def has(self, transfer: str, methods: Sequence[str]) -> bool:
        return len(self.there(transfer, methods)) == len(methods)

    def accuracy(self, transfer: str, method: str) -> str:
        """Mean and 95 % interval."""
        return interval([float(row["value"]) for row in self.tests(transfer, method)])

    def differences(self, transfer: str, method: str, other: str) -> list[float]:
        """A method's accuracy less another's, for each seed that both have: same head, order and test set."""
        theirs = {row["seed"]: float(row["value"]) for row in self.tests(transfer, other)}
        own = self.tests(transfer, method)
        return [float(row["value"]) - theirs[row["seed"]] for row in own if row["seed"] in theirs]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t."""
    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], signed: bool = False) -> str:
    mean = statistics.mean(values)
    return f"{mean:+.1f} ± {half_width(values):.1f}" if signed else f"{mean:.1f} ± {half_width(values):.1f}"


def verdict(values: Sequence[float]) -> str:
    """What an interval of differences says."""
    mean, half = statistics.mean(values), half_width(values)
    if abs(mean) <= half:
        return f"no difference that {counted(len(values), 'seed')} can tell ({interval(values, signed=True)} points)"
    return f"{'better' if mean > 0 else 'worse'} by {abs(mean):.1f} ± {half:.1f} points"


# --- Blocks ------------------------------------------------------------------------------------------------------


def measured(results: Path) -> str:
    found = Transfers(results)
    costs = list(found.costs.values())
    return bullets(
        [
            f"[transfers-cpu.csv](../benchmarks/results/transfers-cpu.csv): {where(found.rows)}",
            f"[transfers-cost-cpu.csv](../benchmarks/results/transfers-cost-cpu.csv): {where(costs)}",
        ]
    )


def of_transfer(transfer: str, results: Path) -> str:
    """The table of every method."""
    found = Transfers(results)
    nothing = int(found.costs[transfer, NOTHING]["peak_bytes"])
    lines = []
    for method in found.there(transfer, TABLE[transfer]):
        first, cost = found.tests(transfer, method)[0], found.costs[transfer, method]
        lines.append([
            f"`{method}`", f"{int(first['trained']):,}", f"{float(first['percent']):.2f}",
            found.accuracy(transfer, method),
            "" if method == LORA else interval(found.differences(transfer, method, LORA), signed=True),
            f"{float(first['learning_rate']):.1g}" + (" †" if first["note"] else ""), f"{float(cost['step_ms']):.0f}",
            megabytes(int(cost["peak_bytes"]) - nothing), f"{int(first['file_bytes']):,}",
        ])  # fmt: skip
    head = [
        NAMES[transfer], "trained", "% of the model", "test accuracy, %", "less `lora`, points", "learning rate",
        "step, ms", "peak, MB", "file, bytes",
    ]  # fmt: skip
    text = f"{table(head, lines)}\n\n† The lowest or the highest rate that was tried."
    return with_left(text, found, transfer, TABLE[transfer])


def with_left(text: str, found: Transfers, transfer: str, methods: Sequence[str]) -> str:
    """A table, and below it the methods that nobody has run yet."""
    there = found.there(transfer, methods)
    left = ", ".join(f"`{method}`" for method in methods if method not in there)
    return f"{text}\n\n{paragraph(f'Not run yet on {NAMES[transfer]}: {left}.')}" if left else text


def findings(results: Path) -> str:
    """What the two tables say about selected weights, in order of importance."""
    found, texts = Transfers(results), []
    for transfer, name in NAMES.items():
        half, chance = HALF[transfer], CHANCE[transfer]
        if not found.has(transfer, (half, LORA, chance, "full")):
            continue
        share = int(found.tests(transfer, half)[0]["trained"]) / int(found.tests(transfer, LORA)[0]["trained"])
        texts.append(
            f"{name}: `{half}` trains {share:.2f} of the weights of `{LORA}` (r = 8). Against it: "
            f"{verdict(found.differences(transfer, half, LORA))}. Against as many random weights per neuron: "
            f"{verdict(found.differences(transfer, half, chance))}. Against full fine-tuning: "
            f"{verdict(found.differences(transfer, half, 'full'))}."
        )
        relative = SEARCH[transfer][0]
        if found.has(transfer, [relative]):
            texts.append(
                f"{name}: as many weights chosen by gradients relative to those of their inputs, `{relative}`, against "
                f"`{half}`: {verdict(found.differences(transfer, relative, half))}. Against `{chance}`: "
                f"{verdict(found.differences(transfer, relative, chance))}. Against `{LORA}`: "
                f"{verdict(found.differences(transfer, relative, LORA))}."
            )
        others = [method for method in found.there(transfer, TABLE[transfer]) if method != half]
        for what, sign in (("better", 1), ("worse", -1)):
            apart = [f"`{method}`" for method in others if _apart(found, transfer, method) == sign]
            texts.append(f"{name}: {what} than `{half}`, beyond the interval: {', '.join(apart) or 'none'}.")
    return bullets(texts)


def _apart(found: Transfers, transfer: str, method: str) -> int:
    """1 or -1 if the interval of the differences to GPS is above or below 0, else 0."""
    values = found.differences(transfer, method, HALF[transfer])
    mean = statistics.mean(values)
    return 0 if abs(mean) <= half_width(values) else int(math.copysign(1, mean))


def against_random(results: Path) -> str:
    """Gradient against random masks by K and by the loss for selection."""
    found, lines = Transfers(results), []
    for transfer, name in NAMES.items():
        for k in KS[transfer]:
            *losses, random = of_k(k)
            if not found.has(transfer, (losses[0], random)):
                continue
            there = found.there(transfer, losses)
            lines.append([
                f"{name}, K = {k}",
                *(found.accuracy(transfer, each) if each in there else "" for each in losses),
                found.accuracy(transfer, random),
                *(interval(found.differences(transfer, each, random), signed=True) if each in there else ""
                  for each in losses),
            ])  # fmt: skip
    head = ["", "contrastive loss", "cross-entropy", "random", "contrastive less random", "cross-entropy less random"]
    return table(head, lines)


def search(results: Path) -> str:
    """What might help at equal cost, in the order of the validation set."""
    found, parts = Transfers(results), []
    for transfer, name in NAMES.items():
        half = HALF[transfer]
        tried = (half, CHANCE[transfer], ENTROPY[transfer], *SEARCH[transfer])
        there = found.there(transfer, tried)
        if not set(there) & set(SEARCH[transfer]):
            continue
        lines = [
            [
                f"`{method}`", f"{int(found.tests(transfer, method)[0]['trained']):,}",
                f"{found.validated(transfer, method):.1f}", found.accuracy(transfer, method),
                "" if method == half else interval(found.differences(transfer, method, half), signed=True),
            ]
            for method in sorted(there, key=lambda method: -found.validated(transfer, method))
        ]  # fmt: skip
        head = [name, "trained", "validation accuracy, %", "test accuracy, %", f"less `{half}`, points"]
        parts.append(with_left(table(head, lines), found, transfer, tried))
    return "\n\n".join(parts) or NOT_YET


def ranks(results: Path) -> str:
    """Accuracy against the rank of the LoRA that serves a delta."""
    found, every = Transfers(results), (*RANKS, ALL_INPUTS)
    there = found.there(REVIEWS, every)
    if ALL_INPUTS not in there:
        return NOT_YET
    lines = [
        [
            method.partition("columns=")[2] or "all inputs", f"{int(found.tests(REVIEWS, method)[0]['trained']):,}",
            found.accuracy(REVIEWS, method),
            "" if method == ALL_INPUTS else interval(found.differences(REVIEWS, method, ALL_INPUTS), signed=True),
        ]
        for method in there
    ]  # fmt: skip
    head = ["rank", "trained", "test accuracy, %", "less all inputs, points"]
    return with_left(table(head, lines), found, REVIEWS, every)


def sizes(results: Path) -> str:
    """How many samples there are, and what an accuracy on so many can tell."""
    texts = []
    for transfer, name in NAMES.items():
        train, validation, test = SIZES[transfer]
        classes = CLASSES[transfer]
        spread = 100 * 1.96 * math.sqrt(0.25 / test)
        texts.append(
            f"{name}: {classes} classes, {classes * train} samples for training, {classes * validation} for validation "
            f"and {test} for testing, which tell an accuracy near one half to ± {spread:.1f} points, and differences "
            "between methods on the same samples better."
        )
    return bullets(texts)


BLOCKS = {
    "transfers measured": measured,
    "transfers findings": findings,
    "transfers reviews": functools.partial(of_transfer, REVIEWS),
    "transfers digits": functools.partial(of_transfer, DIGITS),
    "transfers random": against_random,
    "transfers search": search,
    "transfers ranks": ranks,
    "transfers sizes": sizes,
}
