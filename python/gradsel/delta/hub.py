"""Deltas on a model hub: pushed with a model card, and fetched by the id of their repository."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from gradsel.attached import is_values
from gradsel.errors import first_line
from gradsel.parameters.names import unwrapped

#: The name of a delta in a folder. It does not end in ".safetensors", because servers take all such files for weights.
FILE = "gradsel.delta"
#: Names that it may have: also that in a result of ``gradsel finetune``.
FILES = (FILE, "delta.safetensors")


class Saved(Protocol):
    """What a hub needs of a :class:`gradsel.Delta`."""

    notes: dict[str, Any]

    def save(self, path: str | os.PathLike[str], *, originals: bool = False) -> None: ...

    def trainable_count(self) -> int: ...

    def __len__(self) -> int: ...


def find(source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """The file of a delta: itself, or the one in a folder or repository.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{path} has no delta: neither {' nor '.join(FILES)} is in it")
    if path.is_absolute() or len(path.parts) > 2:
        raise ValueError(f"there is no file or folder {path}")
    return _fetched(os.fspath(source), revision, token)


def _fetched(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in FILES:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
        except EntryNotFoundError:  # it may have the other one; without a network: neither is in the cache
            continue
        except Exception as error:  # not an id, no such repository, no permission
            raise ValueError(
                f"there is no file or folder {repo_id}, and no delta that can be fetched from the hub by that name "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
    raise ValueError(
        f"there is no file or folder {repo_id}, and the repository {repo_id} has no delta, or it cannot be reached: "
        f"neither {' nor '.join(FILES)} is in it"
    )


def push(
    delta: Saved,
    repo_id: str,
    base: str | nn.Module | None,
    originals: bool,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """See :meth:`gradsel.Delta.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        delta.save(path, originals=originals)
        card = model_card(delta, repo_id, base, path.stat().st_size)
        operations = [CommitOperationAdd(FILE, str(path)), CommitOperationAdd("README.md", card.encode())]
        return commit(repo_id, operations, private, token, revision, commit_message)


def commit(
    repo_id: str,
    operations: list[Any],
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
) -> str:
    """Makes a commit to a repository, which is made if there is none; the address of the commit.

    Args:
        operations: of huggingface_hub's ``create_commit``.
        private: of a new repository.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        made = api.create_commit(repo.repo_id, operations, commit_message=message, revision=revision)
    except Exception as error:  # not an id, no permission, no network
        raise ValueError(f"{repo_id} cannot be pushed ({type(error).__name__}: {first_line(error)})") from error
    return str(made.commit_url)


def model_card(delta: Saved, repo_id: str, base: str | nn.Module | None, size: int) -> str:
    """README.md of a delta, with the metadata that hubs read.

    Args:
        base: the name of the base model, or the model, from which the card also has its class and its size.
        size: bytes of the file.
    """
    from huggingface_hub import ModelCardData

    model = unwrapped(base) if isinstance(base, nn.Module) else None
    name = base if isinstance(base, str) else str(getattr(getattr(model, "config", None), "name_or_path", ""))
    is_local = not name or Path(name).exists()
    data = ModelCardData(
        base_model=None if is_local else name, library_name="gradsel", tags=["gradsel", "sparse-fine-tuning"]
    )
    shown = Path(name).name if is_local and name else name  # no paths of this machine
    of = f" of `{shown}`" if shown else ""
    return f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

What fine-tuning changed{of}, and nothing else: a delta of gradsel-kernels.

| | |
|---|---|
{_table(delta, shown, model, size)}

## Use

```sh
pip install gradsel-kernels
```

```python
import gradsel
{_example(shown, model)}
gradsel.Delta.from_pretrained("{repo_id}").apply_(model)
```

`apply_` checks that the model is the base that the delta was made on. What it returns takes the delta off again, to
the bit.
"""


def _table(delta: Saved, base: str, model: nn.Module | None, size: int) -> str:
    count = delta.trainable_count()
    entries = f"{count:,}"
    if model is not None:
        total = sum(p.numel() for p in model.parameters() if not is_values(p))
        entries += f" of {total:,} ({100 * count / total:.3g} %)"
    rows = [("base", f"`{base}`")] if base else []
    rows += [("entries set", entries), ("tensors", f"{len(delta):,}"), ("size", f"{size:,} bytes")]
    rows += [(key, _cell(value)) for key, value in _method(delta.notes).items()]
    return "\n".join(f"| {key} | {value} |" for key, value in rows)


def _method(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The notes that say how the entries were chosen."""
    return {key: notes[key] for key in ("method", "policy", "criterion", "batches") if key in notes}


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _example(base: str, model: nn.Module | None) -> str:
    if model is None or not base or not type(model).__module__.startswith("transformers."):
        return "\nmodel = ...  # the base"
    kind = type(model).__name__
    return f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({base!r})"
