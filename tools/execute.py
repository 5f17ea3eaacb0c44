"""Run one chapter through papermill, with this environment's own kernel, and measure its time and memory.

The kernel may not use the network: an attempt is a failure of the chapter, whatever the library that made it did then.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from tools.offline import refuse_network

CELL_TIMEOUT = 600  # seconds; a cell of a chapter takes one minute at most
MAX_MIB = 2048  # what a chapter may take, as the preface and CONTRIBUTING.md promise
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Failure:
    """What stopped a chapter, and at which cell, if one did: its number (from 1) and its source."""

    error: str
    cell: int | None = None
    source: str = ""

    def __str__(self) -> str:
        if self.cell is None:
            return self.error
        lines = "\n".join(f"    {line}" for line in self.source.splitlines())
        return f"stopped at cell {self.cell}:\n\n{lines}\n\n{self.error}"


@dataclass(frozen=True)
class Execution:
    """How a run went: wall seconds, peak memory of the kernel and its children in MiB, and the failure, if any."""

    seconds: float
    peak_mib: float
    failure: Failure | None = None


def kernel_environment() -> None:
    """Set this process's environment, which kernels inherit: this Python's kernel, no network, no progress bars."""
    os.environ.pop("MPLBACKEND", None)  # figures belong into the notebook
    refuse_network()
    os.environ.update(
        JUPYTER_PREFER_ENV_PATH="1",  # not a kernel of the same name that the user installed elsewhere
        JUPYTER_PATH=str(Path(sys.prefix) / "share" / "jupyter"),
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        KDLIB_PROGRESS="0",
        TQDM_DISABLE="1",
        # Sums are rounded differently with another number of threads; and two chapters run side by side.
        OMP_NUM_THREADS="1",
        # Threads that wait for work by spinning make a busy machine ten times slower.
        OMP_WAIT_POLICY="passive",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )


class PeakMemory(threading.Thread):
    """Samples the memory of all processes that this one starts while a `with` block runs, and of those below them;
    `mib` is the highest sum seen.

    Pages that processes share are counted once for each, so the number is an upper bound.
    """

    def __init__(self, interval: float = 0.1):
        super().__init__(daemon=True)
        self.mib = 0.0
        self._interval = interval
        self._done = threading.Event()
        self._others = {process.pid for process in psutil.Process().children(recursive=True)}

    def run(self) -> None:
        """Sample until the block is left."""
        while True:
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += 0 if process.pid in self._others else process.memory_info().rss
                except psutil.Error:  # it ended meanwhile
                    continue
            self.mib = max(self.mib, total / MEBIBYTE)
            if self._done.wait(self._interval):
                return

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def execute(
    notebook: NotebookNode,
    target: Path,
    cwd: Path,
    parameters: Mapping[str, Any] | None = None,
    timeout: int = CELL_TIMEOUT,
    max_mib: float = MAX_MIB,
) -> Execution:
    """Execute a notebook with papermill and write it, outputs included, to `target`; the kernel starts in `cwd`.

    Stops at the first failing cell.  A cell that raises, runs longer than `timeout` seconds or kills the kernel is
    reported in the result, not raised; so is a notebook that asked for another machine or took more than `max_mib`.
    """
    kernel_environment()
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    asked = target.with_suffix(".asked")
    asked.unlink(missing_ok=True)
    error = None
    started = time.perf_counter()
    with PeakMemory() as memory, mock.patch.dict(os.environ, KDLIB_ASKED=str(asked)):
        try:
            papermill.execute_notebook(
                target,
                target,
                parameters=dict(parameters or {}),
                kernel_name="python3",
                cwd=cwd,
                progress_bar=False,
                execution_timeout=timeout,
                # Local traffic, but the kernel complains on the terminal if it is not encrypted.
                config=Config(KernelManager={"transport_encryption": "auto"}),
            )
        except PapermillExecutionError as caught:
            error = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(caught.traceback))
        except DeadKernelError:
            error = "The kernel died: the process was killed, for want of memory perhaps."
        except CellTimeoutError:
            error = f"The cell ran for more than {timeout} s."
    seconds = time.perf_counter() - started
    failure = None
    if error is not None:
        failure = Failure(error, *_last_started(target))
    elif asked.exists():
        lines = "; ".join(dict.fromkeys(asked.read_text().splitlines()))
        failure = Failure(f"asked the network, which no chapter may: {lines}")
    elif memory.mib > max_mib:
        failure = Failure(f"took {memory.mib:.0f} MiB, {max_mib:.0f} are allowed: use smaller batches or networks")
    return Execution(seconds, memory.mib, failure)


def _last_started(executed: Path) -> tuple[int, str]:
    """Number and source of the last cell that was started; papermill's own notes before it do not count."""
    cells = nbformat.read(executed, as_version=4).cells
    cells = [cell for cell in cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    started = [n for n, cell in enumerate(cells, start=1) if cell.metadata.get("papermill", {}).get("start_time")]
    return started[-1], cells[started[-1] - 1].source
