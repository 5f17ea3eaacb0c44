"""Progress: bars for people, lines for log files, nothing where output is stored.

KDLIB_PROGRESS=0 silences both, KDLIB_PROGRESS=1 forces bars.
"""

import os
import sys
from collections.abc import Iterable, Sized

from tqdm import tqdm


def wanted() -> bool:
    """Whether a person is likely to watch: a terminal or a notebook, unless KDLIB_PROGRESS says otherwise."""
    setting = os.environ.get("KDLIB_PROGRESS")
    if setting is not None:
        return setting not in ("0", "")
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(items: Iterable, description: str, initial: int = 0, total: int | None = None) -> tqdm:
    """Iterate over `items` behind a bar that shows only when the work takes longer than three seconds."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    return tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        disable=not wanted(),
        delay=3,
        leave=False,
        mininterval=0.5,
        dynamic_ncols=True,
    )


def notice(text: str) -> None:
    """Print a line to stderr that a waiting person needs, beside bars too; KDLIB_PROGRESS=0 silences it."""
    if os.environ.get("KDLIB_PROGRESS") not in ("0", ""):
        print(text, file=sys.stderr, flush=True)


def line(text: str) -> None:
    """Print a line to stderr for a log file, where no bar is shown and nobody has asked for silence."""
    if not wanted() and os.environ.get("KDLIB_PROGRESS") is None:
        print(text, file=sys.stderr, flush=True)
