"""Signals and an orphaned kernel end a run between two steps, with its state saved."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest

from kdlib import interrupts, runs
from kdlib.interrupts import SIGNALS, asked_to_stop


def endless(folder) -> runs.RunConfig:
    """A run that nobody waits for: it evaluates, and so saves, once, at the end."""
    settings = {"method": "fine_tune", "student": "tiny-1x32", "max_train": 64, "max_evaluation": 16}
    settings |= {"epochs": 10**6, "evaluate_every": 10**8, "device": "cpu"}
    return runs.configure(**settings, output_dir=str(folder))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_a_flag_and_the_second_one_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with asked_to_stop() as stopping:
            assert not stopping()
            os.kill(os.getpid(), number)
            assert stopping() and not acted
            os.kill(os.getpid(), number)
            assert acted == [number]
        os.kill(os.getpid(), number)
        assert acted == [number] * 2  # as before the block
    finally:
        signal.signal(number, before)


def test_the_signals_of_people_and_of_batch_systems_are_among_them():
    assert {"SIGINT", "SIGTERM", "SIGUSR1"} == {number.name for number in SIGNALS}


def test_another_thread_catches_nothing():
    before = [signal.getsignal(number) for number in SIGNALS]

    def work():
        with asked_to_stop() as stopping:
            assert not stopping() and [signal.getsignal(number) for number in SIGNALS] == before
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert done == [True]


def wait_until(condition, seconds=100.0):
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@contextmanager
def started(command, beginning, **options):
    """A process that has come to its training; it does not outlive the test."""
    process = subprocess.Popen(command, **options)
    try:
        wait_until(beginning.exists)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def script(tmp_path):
    """A command that trains without end and says when it has begun."""
    told = f"""
    import os, pathlib
    from kdlib import runs, trainer
    from tests.test_interrupts import endless
    batches = trainer.training_batches
    def watched(*arguments):
        for batch in batches(*arguments):
            beginning = pathlib.Path({str(tmp_path / "started")!r})
            beginning.with_suffix(".part").write_text(str(os.getpid()))
            beginning.with_suffix(".part").rename(beginning)
            yield batch
    trainer.training_batches = watched
    runs.run(endless({str(tmp_path / "runs")!r}))
    """
    return textwrap.dedent(told)


def test_a_batch_system_ends_a_run_and_loses_nothing(script, tmp_path, root):
    """By one of its signals: that all of them raise the flag is tested above."""
    told = {"cwd": root, "stderr": subprocess.PIPE, "text": True}
    with started([sys.executable, "-c", script], tmp_path / "started", **told) as process:
        process.send_signal(signal.SIGUSR1)
        message = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "TrainingInterruptedError: interrupted after step" in message and "run the same command again" in message
    assert len(list((tmp_path / "runs").glob("*/checkpoint.safetensors"))) == 1


SLOW_STEPS = """
import os, pathlib, time
from kdlib.interrupts import asked_to_stop
with asked_to_stop() as stopping:
    pathlib.Path("part").write_text(str(os.getpid()))
    pathlib.Path("part").rename("started")
    while not stopping():
        time.sleep(0.05)
    time.sleep(2.5)  # the rest of a step; ipykernel looks for its parent every second
    pathlib.Path("saved").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_in_the_kernel_of_an_ended_papermill_is_saved(tmp_path, root, number):
    """papermill passes no signal on, and the kernel would end itself within a second, in mid-step."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLOW_STEPS)])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "run.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "run.ipynb", "out.ipynb"]
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(root)])
    with started(command, tmp_path / "started", cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}) as process:
        kernel = int((tmp_path / "started").read_text())
        process.send_signal(number)
        process.wait(timeout=60)
    try:
        wait_until((tmp_path / "saved").exists)
        wait_until(lambda: not Path(f"/proc/{kernel}").exists())  # saved, it follows its parent
    finally:
        with suppress(ProcessLookupError):
            os.kill(kernel, signal.SIGKILL)


def test_a_kernel_is_kept_alive_inside_the_block_only(monkeypatch):
    """ipykernel's own comparison, made by its poller once a second."""

    class Poller:
        parent_pid = os.getppid()

    poller, orphan = Poller(), os.getppid() + 1
    monkeypatch.setattr(interrupts, "_poller", lambda: poller)

    def would_end(parent):
        return bool((not poller.parent_pid and parent == 1) or (poller.parent_pid and parent != poller.parent_pid))

    with asked_to_stop() as stopping:
        assert not would_end(orphan) and not would_end(1) and not stopping()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stopping()
    assert would_end(orphan) and poller.parent_pid == Poller.parent_pid
