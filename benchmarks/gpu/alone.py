"""A part about whole models as a program of its own."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gradsel.experiments.cost.comparing import Alone
from gradsel.experiments.cost.contenders import Row
from gradsel.experiments.cost.timing import ERROR


def alone(run: Callable[[Any], list[Row]], description: str) -> None:
    """``python -m benchmarks.gpu.<part> [--device cpu] [--small] [--seconds 600]``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument(
        "--seconds", type=float, default=600, help="stop after about this many seconds (default: %(default)s)"
    )
    args = parser.parse_args()
    rows = run(Alone(args.device, args.small, time.monotonic() + args.seconds))
    sys.exit(0 if rows and not any(row["extra"].startswith(ERROR) for row in rows) else 1)
