"""How long work tells its caller where it is, and asks whether to go on.

The runtime knows nothing of ComfyUI. Whoever starts the work installs a :class:`Reporter` for the duration with
:func:`reporting`; the code below (loader, compiler, chunked decoders) finds it through a context variable.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator


class Reporter:
    """Receives progress. The base class ignores everything; subclasses override what they need.

    Every method may raise to stop the work (that is how Cancel works). Callers guarantee that they call
    :meth:`check_cancelled` only at points where stopping leaves nothing half done.
    """

    def message(self, text: str) -> None:
        """A one-line status for people, such as ``"compiling transformer"``."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``stage`` are finished (tensors loaded, chunks decoded)."""

    def check_cancelled(self) -> None:
        """Raise if the user asked to stop."""


_SILENT = Reporter()
_current: contextvars.ContextVar[Reporter] = contextvars.ContextVar("comfyui_tpu_reporter", default=_SILENT)


def current_reporter() -> Reporter:
    """The reporter installed by the nearest enclosing :func:`reporting`, or one that ignores everything."""
    return _current.get()


@contextlib.contextmanager
def reporting(reporter: Reporter) -> Iterator[Reporter]:
    """Install ``reporter`` for the work done inside the ``with`` block (this thread or task only)."""
    token = _current.set(reporter)
    try:
        yield reporter
    finally:
        _current.reset(token)
