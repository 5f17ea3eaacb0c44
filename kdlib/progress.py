"""Progress: bars for people, lines for log files, nothing where output is stored.

Lines go through `logging`, to the logger "kdlib": without a terminal they are shown on stderr, and whoever configures
that logger gets them as well.  KDLIB_PROGRESS=0 silences bars and lines, KDLIB_PROGRESS=1 forces bars.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Sized
from contextlib import suppress
from typing import Any, TypeVar

from tqdm import tqdm

_Item = TypeVar("_Item")

LONG = 20.0
"""Seconds after which a notebook shows lines beside its bars: whoever waits so long may be reading a log file."""

log = logging.getLogger("kdlib")


class _Unbreakable:
    """A stream that swallows what cannot be written: a closed pipe or a full disk must not end a run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Stderr(logging.Handler):
    """Shows lines on whatever sys.stderr is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=_Unbreakable(sys.stderr), flush=True)


if not log.handlers:  # a module that is loaded again must not show everything twice
    log.addHandler(_Stderr())
    log.setLevel(logging.INFO)
    log.propagate = False


def _silenced() -> bool:
    """Whether KDLIB_PROGRESS=0 asks for silence, or another process of the same run speaks for all."""
    return os.environ.get("KDLIB_PROGRESS") in ("0", "") or int(os.environ.get("RANK") or 0) > 0


def wanted() -> bool:
    """Whether a person is likely to watch: a terminal or a notebook, unless KDLIB_PROGRESS says otherwise."""
    setting = os.environ.get("KDLIB_PROGRESS")
    if setting is not None or _silenced():
        return not _silenced()
    return _terminal() or "ipykernel" in sys.modules


def _terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def bar(items: Iterable[_Item], description: str, initial: int = 0, total: int | None = None) -> Iterable[_Item]:
    """Iterate over `items` behind a bar that shows only when the work takes longer than three seconds."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not wanted():
        return items
    return tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        file=_Unbreakable(sys.stderr),
        disable=False,  # whatever TQDM_DISABLE says, which is read long before KDLIB_PROGRESS
        delay=3,
        leave=False,
        mininterval=0.5,
        dynamic_ncols=True,
    )


def notice(text: str) -> None:
    """Tell a person what they should know, beside bars too; KDLIB_PROGRESS=0 silences it."""
    if not _silenced():
        log.warning(text)


def line(text: str, started: float | None = None) -> None:
    """A line for a log file: where no bar is shown, and beside bars in a notebook whose work began `LONG` seconds ago.

    `started` is the `time.perf_counter()` of that beginning.
    """
    if _silenced():
        return
    long = started is not None and time.perf_counter() - started > LONG
    if not wanted() or ("ipykernel" in sys.modules and not _terminal() and long):
        log.info(text)
