"""``gradsel demo``: GPS beside other ways to fine-tune, on handwritten digits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_DEMO, _ABLATION = Path("demo-output/gps-digits.png"), Path("demo-output/ablation.png")
_DEMO_NEEDS = {"sklearn", "matplotlib", "peft"}


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    demo = commands.add_parser("demo", help=text)
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.add_argument(
        "--ablation", action="store_true", help="compare levels, criteria, losses and anchors instead; four minutes"
    )
    demo.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        help=f"the picture to write, next to a JSON file of all numbers (default: {_DEMO}, {_ABLATION})",
    )
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from gradsel.demo import ablation, demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_NEEDS:
            raise
        print(f"The demo needs {package}, which is not installed: pip install 'gradsel-kernels[demo]'", file=sys.stderr)
        return 2
    study, picture, record = (
        (ablation, _ABLATION, "ablation.json") if arguments.ablation else (demo, _DEMO, "results.json")
    )
    results = study.run(arguments.seeds, arguments.quiet)
    print(study.table(results))
    if results.delta is not None:
        print(f"\n{demo.saved_line(results.delta)}")
    output: Path = arguments.output or picture
    demo.save(results, output.with_name(record))
    study.draw(results, output)
    print(f"\nPicture: {output}   All numbers: {output.with_name(record)}")
    return 0
