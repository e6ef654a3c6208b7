"""How commands end: one line about what does not fit, how to install a missing package, or that Ctrl-C stopped them."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run(name: str, command: Callable[[], None]) -> int:
    """Runs a command.

    Returns:
        0; 1 if something given does not fit; 2 if a package is missing; 130 after Ctrl-C.
    """
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"gradsel {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gradsel", "gradsel_kernels"):
            raise
        told = str(error)
        if "pip install" not in told:
            told = f"{error.name} is not installed: pip install 'gradsel-kernels[finetune]'"
        print(f"gradsel {name}: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gradsel {name}: stopped", file=sys.stderr)
        return 130
    return 0
