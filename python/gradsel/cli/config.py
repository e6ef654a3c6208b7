"""``gradsel config``: which kernels are in use on this machine, and why."""

from __future__ import annotations

import argparse

import gradsel_kernels


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("config", help=text)
    parser.set_defaults(command=_config)


def _config(arguments: argparse.Namespace) -> int:
    gradsel_kernels.show_config()
    return 0
