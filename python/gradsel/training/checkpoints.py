"""Whether a checkpoint can be resumed from, found before anything is loaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from gradsel.tensor_files import read_header


def require_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint with a file that is cut off or no longer of its kind, as after a power failure.

    Only beginnings and ends of files are read, so that large ones cost nothing.

    Raises:
        ValueError: see above; the message says what to do.
    """
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with file.open("rb") as stream:
                    read_header(stream)
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
                raise ValueError("not a file of torch")
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged ({error}); remove {checkpoint}, and the run resumes from the checkpoint before it, "
                "or begins anew if there is none"
            ) from None
