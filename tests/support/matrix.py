"""What works with what, as the tests find it: the records behind ``docs/support.md``.

A test says what it shows by a marker. ``@pytest.mark.supports("DDP", "attach", "MaskedAdam")`` means that both work in
the setting DDP if the test passes. ``@pytest.mark.refuses("int8", "attach")`` means that ``attach`` refuses it; such a
test takes the fixture ``refusal`` in place of ``pytest.raises``, and the page has the message. ``pytest --matrix
TESTS`` runs tests and writes what they found to ``docs/support.csv`` and to the page.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = "docs/support.csv"
PAGE = "docs/support.md"

#: The rows of the matrix, and what they are.
SETTINGS = {
    "CPU": "float32 on the CPU",
    "CUDA": "an NVIDIA GPU",
    "autocast": "`torch.autocast`, with a GradScaler for float16",
    "bf16": "weights in bfloat16",
    "fp16": "weights in float16",
    "torch.compile": "the compiled model, as one graph",
    "DDP": "`DistributedDataParallel`",
    "FSDP2": "`fully_shard`",
    "HSDP": "`fully_shard` over a mesh of replicas and shards",
    "TP": "tensor parallelism, `parallelize_module`",
    "FSDP2 + TP": "both on one mesh",
    "DeepSpeed": "ZeRO of DeepSpeed, stages 0 to 2",
    "DCP": "`torch.distributed.checkpoint`",
    "offload": "parameters, or sums of gradients, on the CPU",
    "nf4": "a base in 4 bits, bitsandbytes",
    "int8": "a base in 8 bits, bitsandbytes",
    "torchao int8": "a base in 8 bits, torchao",
    "torchao int4": "a base in 4 bits, torchao",
    "GPTQ": "a base quantised by GPTQ, gptqmodel",
    "AWQ": "a base quantised by AWQ, gptqmodel",
    "HQQ": "a base quantised by HQQ",
    "quanto": "a base in 8 or 4 bits, optimum-quanto",
    "fp8": "a base in float8",
}
#: The columns, and what they are.
OPERATIONS = {
    "select": "`gradsel.select` finds the entries to train",
    "attach": "`gradsel.attach`, and training the attached model",
    "MaskedAdam": "training with `gradsel.MaskedAdam`",
    "other optimizers": "training with an optimizer of torch or of others",
    "save/load": "checkpoints of the attached model, and going on from them",
    "delta": "a delta is made, saved, applied and taken off",
    "merge": "`gradsel.detach`: a plain model with the trained weights",
}
WORKS, REFUSED, NOT_RUN = "works", "refused", "not run"


@dataclass(frozen=True, order=True)
class Record:
    """What one test found: ``operation`` works in ``setting``, is refused, or was not tried; ``message`` says why."""

    setting: str
    operation: str
    test: str
    outcome: str
    message: str

    @property
    def file(self) -> str:
        return self.test.partition("::")[0]

    @property
    def claim(self) -> tuple[str, str, str]:
        return self.file, self.setting, self.operation


def check(setting: str, operations: Iterable[str]) -> None:
    """Raises ValueError for names that the matrix does not have."""
    operations = list(operations)
    if setting not in SETTINGS:
        raise ValueError(f"the setting {setting!r} is not in the support matrix; it has {', '.join(SETTINGS)}")
    if unknown := set(operations) - set(OPERATIONS):
        raise ValueError(f"operations {sorted(unknown)} are not in the matrix; it has {', '.join(OPERATIONS)}")
    if not operations:
        raise ValueError(f"the marker for {setting} names no operation; the matrix has {', '.join(OPERATIONS)}")


def claims() -> set[tuple[str, str, str]]:
    """File, setting and operation of every marker in the tests, read without importing them."""
    found = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        if not re.search(r"mark\.(supports|refuses)\(", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and re.fullmatch(r"pytest\.mark\.(supports|refuses)", ast.unparse(node.func)):
                setting, *operations = (ast.literal_eval(argument) for argument in node.args)
                check(setting, operations)
                found |= {(path.relative_to(ROOT).as_posix(), setting, name) for name in operations}
    return found


def load() -> list[Record]:
    with (ROOT / RECORDS).open(newline="") as file:
        return [Record(**row) for row in csv.DictReader(file)]


def save(records: Iterable[Record]) -> None:
    """Writes the records, and the page that shows them."""
    order = [*SETTINGS, *OPERATIONS]
    records = sorted(set(records), key=lambda r: (order.index(r.setting), order.index(r.operation), r))
    (ROOT / PAGE).write_text(page(records))
    with (ROOT / RECORDS).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Record))
        writer.writerows(map(astuple, records))


def merged(old: Iterable[Record], new: Iterable[Record], claimed: set[tuple[str, str, str]]) -> list[Record]:
    """New records, and those old ones whose tests did not run now and still make the claim."""
    new = list(new)
    ran = {record.test for record in new}
    return [*new, *(record for record in old if record.test not in ran and record.claim in claimed)]


def one_sentence(message: str) -> str:
    """A message without line breaks, up to the end of its first sentence."""
    text = " ".join(message.split())
    return re.split(r"(?<=[.;:]) ", text)[0].rstrip(";:") if len(text) > 240 else text


INTRODUCTION = """# Support matrix

Generated from test results by `pytest --matrix`: every mark below is a test that ran on a CPU, with the versions in
`constraints.txt`, and with gptqmodel 7.7.0 and DeepSpeed 0.19.8, which these do not contain.

- **works**: a test does it and checks the result.
- **refused**: a test sees an error that says why and what to do; [the messages](#refused) are below.
- **in part**: some of it works, and some is refused.
- **not run**: there is a test, but it needs what the machine did not have. No test has run on a GPU yet.
- **untested**: no test says anything.
"""


def page(records: list[Record]) -> str:
    """``docs/support.md``."""
    lines = [INTRODUCTION, f"| | {' | '.join(OPERATIONS)} |", "|---" * (1 + len(OPERATIONS)) + "|"]
    for setting in SETTINGS:
        cells = [_cell([r for r in records if (r.setting, r.operation) == (setting, name)]) for name in OPERATIONS]
        lines.append(f"| **{setting}** | {' | '.join(cells)} |")
    lines += ["", "| setting | |", "|---|---|", *(f"| {name} | {text} |" for name, text in SETTINGS.items())]
    lines += ["", "| operation | |", "|---|---|", *(f"| {name} | {text} |" for name, text in OPERATIONS.items())]
    refused = [record for record in records if record.outcome == REFUSED]
    lines += ["", "## Refused", "", "| | | message |", "|---|---|---|"]
    lines += [f"| {r.setting} | {r.operation} | {_escaped(r.message)} |" for r in _without_repeats(refused)]
    lines += ["", "## Tests", "", "| setting | tests |", "|---|---|"]
    for setting in SETTINGS:
        if files := sorted({record.file for record in records if record.setting == setting}):
            lines.append(f"| {setting} | {', '.join(f'`{file}`' for file in files)} |")
    return "\n".join(lines) + "\n"


def _cell(records: list[Record]) -> str:
    outcomes = {record.outcome for record in records}
    if {WORKS, REFUSED} <= outcomes:
        return "in part"
    return next((name for name in (WORKS, REFUSED, NOT_RUN) if name in outcomes), "untested")


def _without_repeats(records: list[Record]) -> Iterator[Record]:
    seen = set()
    for record in records:
        key = (record.setting, record.operation, record.message)
        if key not in seen:
            seen.add(key)
            yield record


def _escaped(message: str) -> str:
    return re.sub(r"([|<>*_\[\]`])", r"\\\1", message)
