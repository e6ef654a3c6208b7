"""The folder with a result, here or on a model hub."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsel.errors import RunError, expected, first_line
from gradsel.training.config import CONFIG, PathLike, read_config
from gradsel.training.folder import CHECKPOINTS, DATA, LABELS, LOG, RESULTS, SECONDS, read_results
from gradsel_kernels._warnings import user_stacklevel

#: What stays here: what is needed to resume, and what tells about this machine.
_NOT_PUSHED = (LOG, SECONDS, DATA)


@dataclass(frozen=True)
class Result:
    """What :func:`gradsel.finetune` returns.

    Attributes:
        folder: where everything lies.
        results: what ``results.json`` says: ``metrics`` of the test set, ``trained``, ``seconds``, ``history``, ...
    """

    folder: Path
    results: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Those of the test set; see :func:`gradsel.training.evaluation.metrics`."""
        found: dict[str, Any] = self.results["metrics"]
        return found

    @staticmethod
    def from_pretrained(source: PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Result:
        """A result in a folder, or one that :meth:`push_to_hub` has pushed, which is fetched into the hub's cache.

        ``gradsel.predict(result.folder, ...)`` and ``gradsel.evaluate(result.folder, data)`` work with it; its base
        model is loaded by its name.

        Args:
            source: a folder, or an id such as ``"user/birds"``.
            revision: branch, tag or commit on the hub.
            token: of the hub; None: the one that ``hf auth login`` has stored.

        Raises:
            RunError: there is no such folder or id, or it holds no finished result.
        """
        folder = Path(source)
        with expected():
            if not folder.exists():
                folder = _fetched(os.fspath(source), revision, token)
            for name in (CONFIG, LABELS, RESULTS):
                if not (folder / name).is_file():
                    raise RunError(f"{source} holds no finished result of gradsel: it has no {name}")
            return Result(folder, read_results(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add a result of gradsel finetune",
    ) -> str:
        """Pushes the result to a model hub, in one commit: everything but checkpoints, log and paths of this machine.

        Args:
            repo_id: ``"user/birds"``; the repository is made if there is none.
            private: of a new repository; None: the default of its owner.
            token: of the hub; None: the one that ``hf auth login`` has stored.
            revision: branch to commit to; None: the main one.

        Returns:
            The address of the commit.

        Raises:
            RunError: the run is not finished, or the hub refuses.
        """
        from huggingface_hub import CommitOperationAdd

        from gradsel.delta import hub  # which needs torch

        with expected():
            config = read_config(self.folder / CONFIG)
            if not (self.folder / RESULTS).is_file():
                raise RunError(
                    f"the run in {self.folder} is not finished; gradsel resume {self.folder} goes on with it"
                )
            if Path(config.model.name).is_absolute():
                warnings.warn(
                    f"the base model is a folder of this machine, {config.model.name}; whoever loads the result needs "
                    "it under the same path",
                    stacklevel=user_stacklevel(),
                )
            local = {"data.path": Path(config.data.path).name, "output.folder": self.folder.name}
            content = {CONFIG: config.replaced(local).to_yaml().encode()}
            operations = [
                CommitOperationAdd(path.relative_to(self.folder).as_posix(), content.get(path.name, str(path)))
                for path in sorted(self.folder.rglob("*"))
                if path.is_file()
                and path.name not in _NOT_PUSHED
                and CHECKPOINTS not in path.relative_to(self.folder).parts
            ]
            return hub.commit(repo_id, operations, private, token, revision, commit_message)


def _fetched(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token))
    except Exception as error:  # not an id, no such repository, no network, no permission
        raise RunError(
            f"there is no folder {repo_id}, and no result that can be fetched from the hub by that name "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
