"""Tables and sentences about training steps, from ``train_step-cpu.csv``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.results import Row
from benchmarks.pages.figures import bullets, megabytes, paragraph, rows_of, table, where

VIT, LLAMA, LARGE_BATCH = "ViT-B/16, batch 8", "Llama, 1 block of 2048, 512 tokens", "ViT-B/16, 2 blocks, batch 32"
Method = tuple[str, int]
FLOOR: Method = ("floor", 0)
PROBE: Method = ("linear probe", 0)
LORA: Method = ("LoRA", 8)
#: The lines of the tables.
METHODS: dict[Method, str] = {
    FLOOR: "floor: forward and input gradients only",
    ("full fine-tuning", 0): "full fine-tuning, fused AdamW",
    ("GPS as published", 1): "GPS K = 1 as published: dense masks, dense Adam",
    PROBE: "linear probe",
    LORA: "LoRA r = 8 (PEFT)",
    ("SHiRA", 1): "SHiRA (PEFT)",
    ("ours", 1): "**GPS K = 1, attached**",
    ("ours", 2): "**GPS K = 2, attached**",
    ("ours", 5): "**GPS K = 5, attached**",
    ("ours", 10): "**GPS K = 10, attached**",
    ("ours, random", 1): "**random K = 1, attached**",
    ("ours, rows", 3): "**GRFT, 3 rows, attached**",
    ("ours, columns", 3): "**GRFT, 3 columns, attached**",
}
#: Those that the short table leaves out.
IN_BETWEEN = {("ours", 2), ("ours", 5)}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "trained": lambda row: f"{int(row['trained']):,}",
    "step, ms": lambda row: f"{float(row['step_p50_ms']):,.0f}",
    "relative to LoRA": lambda row: f"{float(row['ratio_to_lora']):.2f}",
    "saved activations, MB": lambda row: megabytes(int(row["saved_bytes"])),
    "gradients, state and masks, MB": lambda row: megabytes(
        sum(int(row[name]) for name in ("gradient_bytes", "optimizer_bytes", "mask_bytes"))
    ),
}
STORED: dict[str, Callable[[Row], str]] = {
    "values and indices, MB": lambda row: megabytes(int(row["checkpoint_bytes"])),
}


class Steps:
    """The rows by size and by method with its K."""

    def __init__(self, results: Path) -> None:
        self.path = results / "train_step-cpu.csv"
        self.rows = rows_of(self.path)
        self._found = {(row["size"], row["method"], int(row["k"])): row for row in self.rows}

    def row(self, method: Method, size: str = VIT) -> Row:
        key = (size, *method)
        if key not in self._found:
            raise ValueError(
                f"{self.path.name} has no row {size}, {method[0]}, K = {method[1]}; measure it by make bench"
            )
        return self._found[key]

    def time(self, method: Method, other: Method, size: str = VIT) -> str:
        """The time of a method's step as a share of another's."""
        return f"{float(self.row(method, size)['step_p50_ms']) / float(self.row(other, size)['step_p50_ms']):.2f}"

    def saved(self, method: Method, other: Method, size: str = VIT) -> str:
        """The saved activations of a method as a share of another's."""
        return f"{int(self.row(method, size)['saved_bytes']) / int(self.row(other, size)['saved_bytes']):.2f}"


def measured(results: Path) -> str:
    """Where and when each results file was measured."""
    files = (
        "train_step-cpu.csv", "overhead-cpu.csv", "peft_layers-cpu.csv", "cpu.csv", "select_memory-cpu.csv",
        "quantised-cpu.csv",
    )  # fmt: skip
    return bullets(f"[{name}](../benchmarks/results/{name}): {where(rows_of(results / name))}" for name in files)


def _table(results: Path, methods: Sequence[Method], columns: dict[str, Callable[[Row], str]]) -> str:
    steps = Steps(results)
    return table(
        [f"{VIT}, float32", *columns],
        [[METHODS[method], *(cell(steps.row(method)) for cell in columns.values())] for method in methods],
    )


def all_methods(results: Path) -> str:
    return _table(results, list(METHODS), {**COLUMNS, **STORED})


def main_methods(results: Path) -> str:
    return _table(results, [method for method in METHODS if method not in IN_BETWEEN], COLUMNS)


def findings(results: Path) -> str:
    steps, ours, random = Steps(results), ("ours", 1), ("ours, random", 1)
    inputs = {method: float(steps.row(method)["used_columns_percent"]) for method in (ours, random)}
    return bullets(
        [
            f"A step with K = 1 takes {steps.time(ours, FLOOR)} times as long as forward and input gradients alone, "
            f"with K = 10 {steps.time(('ours', 10), FLOOR)} times as long.",
            f"A step with K = 1 takes {steps.time(ours, LORA)} of LoRA's time ({steps.time(ours, LORA, LLAMA)} on a "
            f"Llama block of width 2048, {steps.time(ours, LORA, LARGE_BATCH)} on two ViT-B/16 blocks at batch 32) "
            f"and needs {steps.saved(ours, LORA)} of LoRA's saved activations ({steps.saved(ours, LORA, LLAMA)} on "
            f"the Llama block, {steps.saved(ours, LORA, LARGE_BATCH)} at batch 32).",
            "Most of that time is spent in the model itself: the floor alone takes "
            f"{steps.time(FLOOR, LORA)} of LoRA's step.",
            f"A linear probe takes {steps.time(PROBE, ours)} of the time of K = 1.",
            "Saved activations depend on the inputs that a mask reads. Masks from gradients read "
            f"{inputs[ours]:.1f} % of them, random masks {inputs[random]:.1f} %, so random masks keep "
            f"{steps.saved(random, ours)} times as many bytes; a step takes {steps.time(random, ours)} times as long. "
            "GRFT's rows read every input, as full fine-tuning does.",
        ]
    )


def findings_in_short(results: Path) -> str:
    steps, ours = Steps(results), ("ours", 1)
    return paragraph(
        f"Measured on {where(steps.rows)}; `make bench` measures it again. A step with K = 1 takes "
        f"{steps.time(ours, FLOOR)} times as long as forward and input gradients alone, {steps.time(ours, LORA)} of "
        f"LoRA's time and {steps.saved(ours, LORA)} of LoRA's saved activations. A linear probe is faster still, at "
        f"{steps.time(PROBE, ours)} of the time of K = 1."
    )
