"""Tables about training on a quantised base, from ``quantised-cpu.csv``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.results import Row, latest, load
from benchmarks.pages.figures import duration, paragraph, table, where


def _rows(results: Path, part: str) -> list[Row]:
    found = latest([row for row in load(results / "quantised-cpu.csv") if row["part"] == part])
    if not found:
        raise ValueError(f"quantised-cpu.csv has no part {part!r}; run python -m benchmarks.training.quantised {part}")
    return found


def adding(results: Path) -> str:
    rows = _rows(results, "adding")
    sizes = sorted({row["model"] for row in rows}, key=lambda size: [int(n) for n in size.split(" x ")])
    providers = [
        "dequantise", "matrix product", "read and write the output",
        *(
            f"{way}, K = {k}"
            for way in ("add to the dense weight", "sparse product", "sparse product (CSR)")
            for k in (1, 8)
        ),
    ]  # fmt: skip
    times = {(row["model"], row["provider"]): duration(float(row["p50_ms"])) for row in rows}
    source = paragraph(
        f"One layer in nf4, {rows[0]['tokens']} tokens in bfloat16, medians, measured on {where(rows)} "
        "([all numbers](../benchmarks/results/quantised-cpu.csv), `python -m benchmarks.training.quantised adding`). A "
        "sparse product has to read and write the output at least once; torch's (CSR) works in float32."
    )
    head = ["", *(size.replace(" x ", " × ") for size in sizes)]  # noqa: RUF001
    return f"{source}\n\n{table(head, [[name, *(times[size, name] for size in sizes)] for name in providers])}"


def inference(results: Path) -> str:
    rows = _rows(results, "inference")
    times = {(row["model"], row["provider"]): float(row["p50_ms"]) for row in rows}
    providers = ["the library's layer", "attached, K = 1", "attached, K = 8", "attached, K = 1, as in training"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = [[name.replace(" x ", " × "), *(duration(times[name, each]) for each in providers)] for name in names]  # noqa: RUF001
    source = paragraph(
        f"One token through one layer, bfloat16, medians, measured on {where(rows)} "
        "([all numbers](../benchmarks/results/quantised-cpu.csv), `python -m benchmarks.training.quantised inference`)."
    )
    return f"{source}\n\n{table(['', *providers], lines)}"


def against_qlora(results: Path) -> str:
    memory, steps = _rows(results, "memory"), _rows(results, "step")
    peaks = {(row["provider"], row["phase"]): f"{int(row['peak_bytes']) / 1e9:.2f} GB" for row in memory}
    lines = []
    for provider in sorted({row["provider"] for row in memory}, key=lambda name: (name.startswith("Q"), name)):
        trained = next(row["trained"] for row in memory if row["provider"] == provider)
        selecting = peaks.get((provider, "select"), "")
        lines.append([provider, f"{int(trained):,}", selecting, peaks[provider, "train"]])
    whole = table(["", "trained", "peak, select", "peak, train"], lines)
    timed = table(
        ["", "trained", "step"],
        [[row["provider"], f"{int(row['trained']):,}", duration(float(row["p50_ms"]))]
         for row in sorted(steps, key=lambda row: (row["provider"].startswith("Q"), row["provider"]))],
    )  # fmt: skip
    source = paragraph(
        f"{memory[0]['model']}, random weights, {memory[0]['tokens']} tokens, computed in bfloat16 without activation "
        "checkpointing; peaks are of the whole process, its libraries and the model included. PEFT's LoRA is on the "
        "same layers; prepared: after `prepare_model_for_kbit_training`, which casts all other weights to float32. "
        f"PEFT {memory[0]['peft']}, bitsandbytes {memory[0]['bitsandbytes']}, measured on {where(memory)} "
        "([all numbers](../benchmarks/results/quantised-cpu.csv), `python -m benchmarks.training.quantised`)."
    )
    second = paragraph(f"Time of a step of {steps[0]['model']}, {steps[0]['tokens']} tokens, taken in turn:")
    return f"{source}\n\n{whole}\n\n{second}\n\n{timed}"
