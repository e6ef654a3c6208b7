"""The command line: ``gradsel demo`` and ``gradsel config``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import gradsel_kernels

_DEMO_NEEDS = {"sklearn", "matplotlib", "peft"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, or 2 where an optional package is missing.
    """
    arguments = _parser().parse_args(argv)
    code: int = arguments.command(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gradsel", description="Gradient-based sparse fine-tuning.")
    parser.add_argument("--version", action="version", version=f"gradsel {gradsel_kernels.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="compare GPS with other ways to fine-tune, on digits, in about a minute")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/gps-digits.png"),
        metavar="PNG",
        help="the picture, with results.json beside it (default: %(default)s)",
    )
    demo.set_defaults(command=_demo)

    config = commands.add_parser("config", help="which kernels are in use on this machine, and why")
    config.set_defaults(command=_config)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from gradsel import demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_NEEDS:
            raise
        print(f"The demo needs {package}, which is not installed: pip install 'gradsel-kernels[demo]'", file=sys.stderr)
        return 2
    results = demo.run(arguments.seeds, arguments.quiet)
    print(demo.table(results))
    record = arguments.output.with_name("results.json")
    demo.save(results, record)
    demo.draw(results, arguments.output)
    print(f"\nPicture: {arguments.output}   All numbers: {record}")
    return 0


def _config(arguments: argparse.Namespace) -> int:
    gradsel_kernels.show_config()
    return 0


if __name__ == "__main__":
    sys.exit(main())
