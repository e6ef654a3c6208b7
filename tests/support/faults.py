"""A file system that fails, or a process that dies, at the n-th call of a save."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from unittest import mock

#: The functions by which files are changed, and one that reads.
CALLS = (
    "open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "chmod", "chown", "stat", "scandir",
)  # fmt: skip


@contextlib.contextmanager
def counting(on_call: Callable[[int, str], None]) -> Iterator[None]:
    """Calls ``on_call`` with the number and name of every call of the functions above, before each."""
    count = 0

    def counted(name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            on_call(count, name)
            return real(*args, **kwargs)

        return call

    real_open = builtins.open

    def opened(file, mode="r", *args, **kwargs):
        nonlocal count
        count += 1
        on_call(count, "open")
        stream = real_open(file, mode, *args, **kwargs)
        if "w" in mode or "+" in mode:
            return Counted(stream, lambda: counting_write())
        return stream

    def counting_write() -> None:
        nonlocal count
        count += 1
        on_call(count, "write")

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            if name != "write":
                stack.enter_context(mock.patch.object(os, name, counted(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        yield


class Counted:
    """A stream whose writes are counted; half of the bytes of a write that fails are there."""

    def __init__(self, stream: io.IOBase, before: Callable[[], None]) -> None:
        self._stream, self._before = stream, before

    def write(self, data):
        try:
            self._before()
        except BaseException:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            raise
        return self._stream.write(data)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stream.close()


def killed_at(number: int, save: Callable[[], None]) -> bool:
    """Runs ``save`` in a child process that dies before the n-th of these calls; False if there are fewer."""

    def die(count: int, name: str) -> None:
        if count == number:
            os._exit(9)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            with counting(die):
                save()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the save failed by itself"
    return status == 9
