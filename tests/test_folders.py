"""The folder of a run: who is in it, whether it can be written, and what a killed run has left there."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdlib import folders
from kdlib.checkpoints import CheckpointError


def test_the_second_to_compute_a_run_says_so_and_waits_for_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_PROGRESS", "1")  # as for a person who watches bars
    inside, order = threading.Event(), []

    def first():
        with folders.alone_in(tmp_path / "run"):
            inside.set()
            deadline = time.monotonic() + 20
            while "another process: waiting" not in capsys.readouterr().err and time.monotonic() < deadline:
                time.sleep(0.01)
            order.append("first")

    def second():
        inside.wait(20)
        with folders.alone_in(tmp_path / "run"):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result(60)
    assert order == ["first", "second"]


def test_a_run_can_be_computed_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), folders.alone_in(tmp_path):
        raise ZeroDivisionError
    with folders.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("enter", [folders.prepare_folder, lambda folder: folders.alone_in(folder).__enter__()])
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path, enter):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "run", Path("/proc/kdlib/run"), tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match=f"cannot write to {folder}.*choose another output_dir"):
            enter(folder)


def test_what_a_killed_run_was_writing_is_cleared_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    (folder / ".student.123.tmp").mkdir(parents=True)
    (folder / ".student.123.tmp" / "model.safetensors").write_bytes(b"half")
    (folder / ".checkpoint.safetensors.123.tmp").write_bytes(b"half")
    for kept in ("checkpoint.safetensors", folders.LOCK, "notes.tmp"):
        (folder / kept).write_bytes(b"whole")
    folders.prepare_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == [folders.LOCK, "checkpoint.safetensors", "notes.tmp"]
