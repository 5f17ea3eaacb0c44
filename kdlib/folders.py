"""The folder of a run: that it can be written, what a killed run has left there, and that nobody else is in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kdlib import processes
from kdlib.checkpoints import CheckpointError
from kdlib.progress import notice

LOCK = ".lock"


def prepare_folder(folder: Path) -> None:
    """Create `folder`, see that it can be written, before any work is done, and clear what a killed run left.

    Raises CheckpointError that names the folder and the remedy.
    """
    processes.once(lambda: _prepare(folder))


def _prepare(folder: Path) -> None:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        for stale in folder.glob(".*.tmp"):  # left by a run that was killed while it wrote
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Put an OSError of the block into a CheckpointError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder} ({error.strerror or error}): choose another output_dir"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Create `folder`; keep others out who compute the same run, or wait until they have left.

    A process that is killed leaves too: its lock is the operating system's.  Of the processes of one run the first one
    goes in for all.

    Raises CheckpointError if `folder` cannot be written.
    """
    lock = FileLock(folder / LOCK)
    processes.once(lambda: _acquire(lock, folder))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            notice(f"{folder.name} is being computed by another process: waiting for it")
            lock.acquire()
