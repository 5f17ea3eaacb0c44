"""One way to write: a file or a folder appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path, keep: bool = False) -> Iterator[Path]:
    """Give the block a path beside `path` to write a file or a folder to; when the block ends, it becomes `path`.

    What stood at `path` is intact until then, and stays if the block raises; what the block wrote is removed then.
    A process that is killed leaves `.<name>.<process>.tmp`.  Files get the permissions of any new file and are on the
    disk before they take their name.  With `keep` a folder that somebody else has put there in the meantime stays.

    Raises OSError if the folder around `path` cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        whole = temporary.is_dir()
        for file in [file for file in temporary.rglob("*") if file.is_file()] if whole else [temporary]:
            _settle(file)
        if not whole:
            os.replace(temporary, path)
        else:
            if not keep:
                _remove(path)
            try:
                temporary.rename(path)
            except OSError:
                if not (keep and path.is_dir()):
                    raise
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _settle(file: Path) -> None:
    """Onto the disk, and readable for whoever may read any new file: safetensors lets nobody but the owner do so."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
