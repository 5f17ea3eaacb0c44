"""Progress bars: on for people, off where output is stored.  Set KDLIB_PROGRESS=0 to silence them, 1 to force them."""

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
