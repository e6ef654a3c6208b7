"""``gradsel demo``: ``gradsel finetune`` on handwritten digits, and studies of what to train."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradsel.cli.running import run

STUDIES = ("methods", "ablation")


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    demo = commands.add_parser("demo", help=text)
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="FOLDER",
        help="where data, model and results go; default: demo-output",
    )  # fmt: skip
    demo.add_argument(
        "--study", choices=STUDIES,
        help="compare instead: methods side by side, or the papers' ablations; writes a picture and a JSON file",
    )  # fmt: skip
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of a study; default: 0 1 2")
    demo.add_argument("--quiet", action="store_true", help="no progress bars and no log")
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    def command() -> None:
        if arguments.study is None:
            _finetune(arguments.output, arguments.quiet)
        else:
            _study(arguments.study, arguments.output, arguments.seeds, arguments.quiet)

    return run("demo", command)


def _finetune(folder: Path, quiet: bool) -> None:
    from gradsel.cli.finetune import config_of
    from gradsel.cli.main import parser
    from gradsel.demo import demo
    from gradsel.training import finetune

    if not (folder / demo.MODEL).exists():
        print("A small vision transformer learns the digits 0 to 4, in place of a download ...", flush=True)
    with demo.one_thread():
        data, model = demo.prepare(folder, quiet)
        output = demo.new_output(folder)
        words = demo.command(data, model, output)
        print(
            f"\nNow it is fine-tuned on the digits 5 to 9, as by this command:\n\n  {demo.typed(words)}\n", flush=True
        )
        result = finetune(config_of(parser(words).parse_args(words)), quiet=quiet)
    print(f"\n{result.metrics['top1']:.1f} % of {result.metrics['samples']} test images are right, "
          f"with {result.results['share']:.2f} % of the weights trained.")  # fmt: skip
    print(f"The result is in {output}. Its report:\n{(output / 'report.html').resolve()}")


def _study(name: str, folder: Path, seeds: list[int], quiet: bool) -> None:
    from gradsel.demo import study

    results = study.run(name, seeds, quiet, folder)
    print(study.table(results))
    study.save(results, folder / f"{name}.json")
    study.draw(results, folder / f"{name}.png")
    print(f"\nPicture: {folder / f'{name}.png'}   All numbers: {folder / f'{name}.json'}")
