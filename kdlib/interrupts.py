"""What may end a run early, as a question that the training loop asks between two steps.

Ctrl-C, and the signals that batch systems send before their limit (SIGTERM, SIGUSR1), would tear a step apart.  Inside
`asked_to_stop` they only raise a flag.  A run inside a notebook's kernel has one more reason: the process that started
the kernel, papermill for example, was ended, which the kernel itself would follow within a second, in mid-step.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that tells whether somebody wants the work inside the block to end; the block decides when.

    The first signal is caught, the second one of its kind acts as it would have acted outside.  Only the main thread
    can catch signals; elsewhere nothing is caught.
    """
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield caught.is_set
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handler(number: int, frame: Any) -> None:
        caught.set()
        signal.signal(number, _restorable(before[number]))

    for number in SIGNALS:
        signal.signal(number, handler)
    with _kernel_kept_alive() as orphaned:
        try:
            yield lambda: caught.is_set() or orphaned()
        finally:
            for number, action in before.items():
                signal.signal(number, _restorable(action))


def _restorable(action: Any) -> Any:
    return signal.SIG_DFL if action is None else action  # None: it was not set from Python


class _AnyParent(int):
    """A process id that differs from no other, so that ipykernel's poller does not miss its parent."""

    __hash__ = int.__hash__

    def __ne__(self, other: object) -> bool:
        return False


@contextmanager
def _kernel_kept_alive() -> Iterator[Callable[[], bool]]:
    """Let a kernel whose parent has ended live until the block is left; the function tells whether it has ended."""
    parent = os.getppid()
    poller = _poller()
    if poller is None:
        yield lambda: False
        return
    before = poller.parent_pid
    poller.parent_pid = _AnyParent(parent)
    try:
        yield lambda: os.getppid() != parent
    finally:
        poller.parent_pid = before


def _poller() -> Any:
    """The thread by which ipykernel ends itself when its parent is gone; None outside a kernel."""
    application = getattr(sys.modules.get("ipykernel.kernelapp"), "IPKernelApp", None)
    if application is None or not application.initialized():
        return None
    poller = getattr(application.instance(), "poller", None)
    return poller if hasattr(poller, "parent_pid") else None
