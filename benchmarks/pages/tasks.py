"""Tables and sentences about the files of tasks and the memory of ``select()``.

They are from ``cpu.csv`` and ``select_memory-cpu.csv``.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.harness.results import Row
from benchmarks.pages.figures import Medians, duration, paragraph, rows_of, table, where

SIZE = "ViT-B/16, 100 classes"
SAVE, LOAD, APPLY, SWITCH = (
    "save a task",
    "load a task and take it back",
    "apply and revert a task",
    "switch between two tasks",
)


def _file(medians: Medians, provider: str, dtype: str = "float32", kernel: str = SAVE) -> str:
    """The size of a task's file."""
    return f"{int(medians.row(kernel, SIZE, 1, provider, dtype)['bytes']) / 1e6:.3g} MB"


def file_size(results: Path) -> str:
    medians = Medians(results)
    return paragraph(
        "For ViT-B/16, GPS with K = 1 and 100 classes, a delta holds 244,324 numbers in a file of "
        f"{_file(medians, 'delta')} ({_file(medians, 'delta', 'bfloat16')} with bfloat16 values). A LoRA adapter "
        f"(r = 8) is {_file(medians, 'LoRA r=8, merged', kernel=LOAD)}, a full checkpoint "
        f"{_file(medians, 'full checkpoint')}."
    )


def sizes(results: Path) -> str:
    medians = Medians(results)
    return paragraph(
        f"For ViT-B/16 with 100 classes, the file of a task (GPS, K = 1) is {_file(medians, 'delta')}, a LoRA "
        f"adapter (r = 8) is {_file(medians, 'LoRA r=8, merged', kernel=LOAD)}, and a full checkpoint is "
        f"{_file(medians, 'full checkpoint')}."
    )


def times(results: Path) -> str:
    medians = Medians(results)

    def ms(kernel: str, provider: str) -> str:
        return duration(medians.ms(kernel, SIZE, 1, provider))

    lines = [
        ["save a task", ms(SAVE, "delta"), ms(SAVE, "full checkpoint"), ""],
        ["save it without a selection, so that all weights are read", ms(SAVE, "delta, fingerprints computed"), "", ""],
        [
            "load its file, apply it, revert it",
            *(ms(LOAD, name) for name in ("delta", "full checkpoint", "LoRA r=8, merged")),
        ],
        ["apply a loaded task and revert it, base checked", ms(APPLY, "delta"), ms(APPLY, "load_state_dict"), ""],
        [
            "switch between two tasks of a bank",
            *(ms(SWITCH, name) for name in ("task bank", "load_state_dict", "LoRA r=8, unmerged and merged")),
        ],
    ]
    source = paragraph(
        "ViT-B/16, K = 1, with biases and a head of 100 classes; medians of interleaved rounds, with caches swept in "
        f"between, measured on {where(medians.rows)} ([all numbers](../benchmarks/results/cpu.csv), "
        "`python -m pytest benchmarks/selection/test_delta.py`)."
    )
    return f"{source}\n\n{table(['', 'delta', 'full checkpoint', 'LoRA, r = 8'], lines)}"


def selecting_within_memory(results: Path) -> str:
    path = results / "select_memory-cpu.csv"
    found = {row["phase"]: row for row in rows_of(path)}

    def phase(name: str) -> Row:
        if name not in found:
            raise ValueError(f"{path.name} has no phase {name}; measure it by make bench")
        return found[name]

    def noted(name: str, pattern: str) -> str:
        """A figure in the note of a phase."""
        match = re.search(pattern, phase(name)["note"])
        if match is None:
            raise ValueError(f"the note of {name} in {path.name} has no {pattern}")
        return match[1]

    weights = int(noted("weights", r"(\d+) bytes")) / 1e9
    passes = noted("select, grouped", r"(\d+) passes")
    words = {
        "weights": f"weights ({weights:.2f} GB) and the libraries",
        "forward": "a forward pass that saves what all weight gradients need",
        "select, streaming": "select, streaming, one batch",
        "select, grouped": f"select, grouped in 1 GB, two batches, {passes} passes",
        "select, full": "select, full, two batches",
        "attach and train a step": "attach and train a step",
    }
    lines = [
        [
            text,
            f"{int(phase(name)['peak_bytes']) / 1e9:.2f}",
            "" if name == "weights" else f"{float(phase(name)['seconds']):.0f}",
        ]
        for name, text in words.items()
    ]
    source = paragraph(
        f"Measured on {where(list(found.values()))} ([all numbers](../benchmarks/results/select_memory-cpu.csv), "
        "`python -m benchmarks.selection.select_memory`):"
    )
    return f"{source}\n\n{table(['', 'peak of the process, GB', 'seconds, on a busy machine'], lines)}"
