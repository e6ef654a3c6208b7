"""Where a warning points: at the user's code, however deep inside the library it is raised."""

from __future__ import annotations

import sys

#: Frames of these packages are passed over: ours, and torch's between a public function and its kernel.
_PASSED_OVER = ("gradsel", "gradsel_kernels", "torch")


def user_stacklevel() -> int:
    """The ``stacklevel`` of :func:`warnings.warn`, called beside this, for the first frame of the user's code.

    Without such a frame, as in a thread of the autograd engine, it is that of the outermost frame.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    return level
