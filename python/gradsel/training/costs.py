"""What a run cost, beside full fine-tuning of the same model in float32 with Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

from gradsel.selection.selection import Selection

#: Bytes of a trained scalar: its gradient, and Adam's two moments.
_GRADIENT, _MOMENTS = 4, 8
#: Seconds below which a duration is not worth a line.
SHORTEST = 0.05


class Cost(NamedTuple):
    """One line of the comparison.

    Attributes:
        ours, full: values with their units, as text.
        source: "measured" or "computed", and from what.
        share: ours as a fraction of full, or None.
    """

    what: str
    ours: str
    full: str
    source: str
    share: float | None = None


def table(results: dict[str, Any], selection: Selection | None) -> list[Cost]:
    """What was trained, stored and spent, beside full fine-tuning.

    Args:
        results: as in results.json.
        selection: its indices are part of what training holds.
    """
    trained, total = results["trained"], results["parameters"]
    indices = 0 if selection is None else sum(t.nbytes for mask in selection.values() for t in mask.tensors().values())
    held, full_held = (_GRADIENT + _MOMENTS) * trained + indices, (_GRADIENT + _MOMENTS) * total
    seconds, steps = results["seconds"], results["steps"]
    rows = [
        Cost("trained scalars", f"{trained:,}", f"{total:,}", "counted", trained / max(total, 1)),
        Cost("gradients, Adam's moments, indices", size(held), size(full_held),
             "computed from the counts, float32", held / max(full_held, 1)),
        Cost("the result on disk", size(results["bytes"]), size(results["bytes_of_full_model"]),
             "file size; full: size of the model's tensors", results["bytes"] / max(results["bytes_of_full_model"], 1)),
    ]  # fmt: skip
    if seconds.get("selection", 0) >= SHORTEST:
        rows.append(Cost("choosing what to train", duration(seconds["selection"]), "none", "measured"))
    if seconds.get("training"):
        per_step = f", {1000 * seconds['training'] / steps:.0f} ms a step" if steps else ""
        rows.append(
            Cost("training, with validation and checkpoints", f"{duration(seconds['training'])}{per_step}",
                 "not run", f"measured, {results['device']}")
        )  # fmt: skip
    if seconds.get("testing", 0) >= SHORTEST:
        rows.append(Cost("testing", duration(seconds["testing"]), "the same", "measured"))
    if results.get("peak_memory_bytes"):
        rows.append(Cost("peak memory of the GPU", size(results["peak_memory_bytes"]), "not run", "measured"))
    return rows


def size(count: float) -> str:
    """Bytes with a decimal unit: ``1.18 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``35 s``, ``2 min 5 s``, ``3 h 4 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
