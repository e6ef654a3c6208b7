"""``gradsel predict``: classifies images or texts, or segments images, with a result of ``gradsel finetune``."""

from __future__ import annotations

import argparse

from gradsel.cli.running import is_first, run
from gradsel.errors import RunError, expected
from gradsel.training.config import run_in


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("predict", help=text)
    parser.add_argument("folder", metavar="FOLDER", help="what gradsel finetune wrote")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="an image, or a text; a pair of texts with --pair")
    parser.add_argument("--pair", action="store_true", help="inputs are pairs: first, second, first, second, ...")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to print; default: 3")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="segmentation: where to write masks; default: predictions in the run's folder",
    )
    parser.set_defaults(command=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    def command() -> None:
        if not is_first():
            return
        inputs = list(arguments.inputs)
        if arguments.top < 1:
            raise RunError(f"--top must be at least 1, got {arguments.top}")
        if arguments.pair:
            if len(inputs) % 2:
                raise RunError(f"--pair takes an even number of texts, got {len(inputs)}")
            inputs = list(zip(inputs[::2], inputs[1::2], strict=True))
        with expected():
            run_in(arguments.folder)  # before torch is imported
        from gradsel.training import predict
        from gradsel.training.using import finished

        with expected():
            _, config = finished(arguments.folder)
        if config.data.task == "segmentation":
            _segment(arguments)
            return
        if arguments.output is not None:
            raise RunError("--output is where masks are written, but this run predicts classes")
        for given, classes in zip(inputs, predict(arguments.folder, inputs, arguments.top), strict=True):
            shown = given if isinstance(given, str) else " | ".join(given)
            print(f"{shown}\t" + "\t".join(f"{name} {100 * share:.1f} %" for name, share in classes))

    return run("predict", command)


def _segment(arguments: argparse.Namespace) -> None:
    from gradsel.training.segmentation.predicting import write_masks

    if arguments.pair:
        raise RunError("--pair is for texts, but this run segments images")
    files = write_masks(arguments.folder, arguments.inputs, arguments.output)
    for image, mask in zip(arguments.inputs, files, strict=True):
        print(f"{image}\t{mask}")
