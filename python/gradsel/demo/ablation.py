"""``gradsel demo --ablation``: the ablations of GPS (Tab. 6) and GRFT (Tab. 4 and 5) in miniature.

Uses the demo's digits. All variants train about as many weights as GPS with K = 1, and differ in which ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gradsel
from gradsel.demo import demo, plots
from gradsel.demo.data import NEW, OLD
from gradsel.demo.demo import Results
from gradsel.demo.methods import Method, attached, chosen

NEURON, ROWS, COLUMNS = gradsel.PerNeuron(1), gradsel.Rows, gradsel.Columns

# Every rate and the strength of every pull is the best for its variant according to demo.tune(methods=VARIANTS): pulls
# among powers of ten, rates among powers of ten and three times these.
SECTIONS: Mapping[str, Sequence[Method]] = {
    "level (gradient, contrastive loss)": (
        Method("net", 3e-2, attached(chosen(gradsel.Global)), plots.SKY),
        Method("layer", 3e-2, attached(chosen(gradsel.PerLayer)), plots.SKY),
        Method("neuron: GPS", 3e-2, attached(chosen(NEURON)), plots.BLUE),
        Method("neuron, 8 columns a matrix", 3e-2, attached(chosen(gradsel.PerNeuron(1, columns=8))), plots.SKY),
        Method("rows", 1e-1, attached(chosen(ROWS)), plots.SKY),
        Method("columns", 1e-1, attached(chosen(COLUMNS)), plots.SKY),
    ),
    "criterion": (
        Method("net, random", 1e-1, attached(chosen(gradsel.Global, "random")), plots.ORANGE),
        Method("neuron, random", 1e-1, attached(chosen(NEURON, "random")), plots.ORANGE),
        Method("neuron, magnitude", 3e-2, attached(chosen(NEURON, "magnitude")), plots.ORANGE),
    ),
    "loss": (Method("neuron, head + CE", 3e-2, attached(chosen(NEURON, head=True)), plots.GREEN),),
    "pull to the pre-trained weights": (
        Method("neuron + L2", 3e-2, attached(chosen(NEURON), 1e-4), plots.PINK),
        Method("rows + L2: GRFT", 1e-1, attached(chosen(ROWS), 1e-3), plots.PINK),
        Method("columns + L2: GRFT", 1e-1, attached(chosen(COLUMNS), 1e-3), plots.PINK),
    ),
}
VARIANTS = tuple(method for methods in SECTIONS.values() for method in methods)


def run(seeds: Sequence[int] = (0, 1, 2), quiet: bool = False) -> Results:
    """Adapts the demo's network with every variant and seed."""
    return demo.run(seeds, quiet, methods=VARIANTS)


def table(results: Results) -> str:
    """The results as text, section by section, with differences to GPS."""
    rows = {row.method: row for row in results.rows}
    gps = rows["neuron: GPS"]
    lines = [
        f"Digits {OLD[0]}-{OLD[-1]} to {NEW[0]}-{NEW[-1]}, {results.settings.shots} examples of "
        f"each, {results.test_images} test images, {len(results.seeds)} seeds.",
        "",
        f"{'':<28}{'accuracy %':>13}{'against GPS':>13}{'trained %':>11}",
    ]
    for section, methods in SECTIONS.items():
        lines.append(section)
        for row in (rows[method.name] for method in methods):
            reached = f"{row.mean:.1f} ± {row.std:.1f}" if len(row.outcomes) > 1 else f"{row.mean:.1f}"
            lines.append(f"  {row.method:<26}{reached:>13}{row.mean - gps.mean:>+13.1f}{row.trained_percent:>11.2f}")
    lines += [
        "",
        "accuracy: mean and standard deviation over seeds; trained: share of all weights, head and biases included.",
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """The picture: the accuracy of every variant, and the blocks of the weights selected at net and neuron level."""
    drawing, (left, middle, right) = plots.figure(3, 19, 8.5)
    plots.accuracies(
        left,
        {row.method: row.accuracies for row in results.rows},
        {row.method: f"{row.trained_percent:.3g} % of the weights" for row in results.rows},
        {method.name: method.colour for method in VARIANTS},
    )
    left.set_title("Which weights to train, at about equal numbers")
    first = {row.method: row.outcomes[0].distribution for row in results.rows}
    right.sharey(middle)  # one scale, so that heights can be compared
    for axes, name in ((middle, "net"), (right, "neuron: GPS")):
        plots.distribution(axes, first[name])
        axes.set_xlabel(f"{name}: where its weights lie (seed {results.seeds[0]})")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(drawing, path)
