"""Bars for people, lines for log files, silence where output is stored; and nobody is counted."""

import io
import logging
import os
import subprocess
import sys
import time

import pytest

from kdlib import progress, trainer
from tests import toy


class Screen(io.StringIO):
    """What is printed to stderr, a terminal or not."""

    terminal = True

    def isatty(self):
        return self.terminal


@pytest.fixture
def show(monkeypatch):
    """A function that puts the screen in place: pytest puts its own there after the fixtures."""
    for name in ("KDLIB_PROGRESS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

    def place(terminal=True):
        screen = Screen()
        screen.terminal = terminal
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return place


def test_short_work_shows_no_bar(show):
    screen = show()
    assert list(progress.bar(range(3), "short")) == [0, 1, 2]
    assert "short" not in screen.getvalue()


def test_long_work_shows_a_bar(show):
    screen = show()
    items = progress.bar(range(3), "long")
    items.start_t -= 4  # seconds ago
    items.last_print_t -= 4
    assert list(items) == [0, 1, 2]
    assert "long" in screen.getvalue()


@pytest.mark.parametrize(
    ("setting", "terminal", "kernel", "bars", "lines"),
    [
        (None, True, False, True, False),  # a terminal
        (None, False, True, True, False),  # a notebook
        (None, False, False, False, True),  # a log file
        ("0", True, True, False, False),
        ("", True, False, False, False),
        ("1", False, False, True, False),
    ],
)
def test_who_gets_what(show, monkeypatch, setting, terminal, kernel, bars, lines):
    screen = show(terminal)
    if setting is not None:
        monkeypatch.setenv("KDLIB_PROGRESS", setting)
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert progress.wanted() is bars
    progress.line("one line")
    assert screen.getvalue() == ("one line\n" if lines else "")
    progress.notice("be patient")  # a bar does not say why nothing happens
    assert ("be patient\n" in screen.getvalue()) is (setting not in ("0", ""))


class Broken(io.StringIO):
    """The writing end of a pipe that nobody reads any more, or of a full disk."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")], ids=str
)
@pytest.mark.parametrize("setting", [None, "1"])
def test_an_output_that_cannot_be_written_ends_nothing(show, monkeypatch, setting, error):
    show(terminal=False)
    if setting is not None:
        monkeypatch.setenv("KDLIB_PROGRESS", setting)
    monkeypatch.setattr(sys, "stderr", Broken(error))
    items = progress.bar(range(3), "long")
    if setting == "1":
        items.start_t = items.last_print_t = items.start_t - 4
    assert list(items) == [0, 1, 2]
    progress.line("one line")
    progress.notice("be patient")


def test_without_a_stream_at_all_nothing_is_shown_and_nothing_ends(show, monkeypatch):
    show()
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.bar(range(3), "long")) == [0, 1, 2]
    progress.line("one line")
    progress.notice("be patient")


def test_lines_go_through_logging(show):
    """Who configures the logger gets them as well: a file, a service."""
    show(terminal=False)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    logging.getLogger("kdlib").addHandler(handler)
    try:
        progress.line("one line")
        progress.notice("be patient")
    finally:
        logging.getLogger("kdlib").removeHandler(handler)
    assert lines == ["INFO one line", "WARNING be patient"]


def test_a_kernel_shows_lines_of_work_that_takes_long(show, monkeypatch):
    """papermill's log file is read by people; a notebook in a browser has bars."""
    screen = show(terminal=False)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    now = time.perf_counter()
    progress.line("soon", now)
    progress.line("late", now - progress.LONG - 1)
    assert screen.getvalue() == "late\n"


def test_training_writes_a_line_an_epoch_into_a_log_file(show):
    screen = show(terminal=False)
    data, who = toy.encoded(), toy.student()
    schedule = trainer.Schedule(epochs=2, batch_size=16)
    result = trainer.train(toy.training(who, data, schedule))
    assert screen.getvalue().splitlines() == [
        f"student: epoch {row.epoch:.2f}, loss {row.train_loss:.4f}, validation/accuracy {row._5:.4f}"
        for row in result.history.itertuples()
    ]


def test_nobody_is_counted_unless_they_want_to_be():
    """huggingface_hub reads the variable when it is imported, so kdlib sets it first."""
    script = "import kdlib, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    for setting, expected in ((None, "True"), ("0", "False"), ("1", "True")):
        environment = {n: v for n, v in os.environ.items() if n not in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
        environment.pop("HF_HUB_OFFLINE", None)  # offline means untold, whatever the variable says
        environment |= {} if setting is None else {"HF_HUB_DISABLE_TELEMETRY": setting}
        answer = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert answer.stdout.strip() == expected, answer.stderr


def test_tqdm_does_not_ask_for_widgets():
    code = (
        "import sys, kdlib, warnings\n"
        "warnings.warn('IProgress not found. Please update jupyter and ipywidgets.')\n"
        "warnings.warn('another')\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another" in answer.stderr and "IProgress" not in answer.stderr
