"""Trackers: that they get the history of a run, change nothing of it, and are missed with a remedy."""

import dataclasses
import os

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from kdlib import engine, pretraining, records, runs, trackers
from kdlib.settings import ConfigurationError

QUICK = {"task": "mini-mnli", "method": "fine_tune", "student": "tiny-1x32", "max_train": 96, "max_evaluation": 64}
QUICK |= {"epochs": 2, "device": "cpu"}


class Kept(GeneralTracker):
    """Stands in for a tracker: keeps what it gets, and when."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, project, **options):
        super().__init__()
        self.events = [("begun", project, options)]
        Kept.last = self

    @property
    def tracker(self):
        return self.events

    def store_init_configuration(self, values):
        self.events.append(("told", values))

    def log(self, values, step=None, **_):
        self.events.append(("row", step, values))

    def finish(self):
        self.events.append(("finished",))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Kept)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    yield
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_a_tracker_gets_the_history_and_changes_nothing(stand_in, tmp_path):
    plain = runs.run(runs.configure(**QUICK, output_dir=str(tmp_path / "plain")))
    config = runs.configure(**QUICK, log_with="wandb", output_dir=str(tmp_path / "followed"))
    followed = runs.run(config)
    assert (followed.run_id, followed.metrics, followed.history) == (plain.run_id, plain.metrics, plain.history)
    begun, told, *rows, finished = Kept.last.events
    where = str(followed.folder / trackers.TRACKED)
    assert begun == ("begun", "kdlib", {"name": followed.run_id, "dir": where}) and finished == ("finished",)
    assert told[1]["learning_rate"] == 2e-3 and "output_dir" not in told[1] and None not in told[1].values()
    assert [(step, values) for _, step, values in rows] == [(row["step"], row) for row in followed.history]
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_run_that_fails_closes_its_tracker(stand_in, tmp_path):
    config = runs.configure(**QUICK, log_with="wandb", output_dir=str(tmp_path), max_seconds=1e-9)
    with pytest.raises(KeyboardInterrupt):
        runs.run(config)
    assert Kept.last.events[-1] == ("finished",)


def test_tensorboard_reads_what_a_run_on_text_wrote(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quick = {"steps": 4, "evaluate_every": 2, "max_lines": 64, "output_dir": str(tmp_path), "device": "cpu"}
    config = pretraining.configure(method="mlm", student="tiny-1x32", log_with="tensorboard", **quick)
    record = pretraining.run(config)
    events = EventAccumulator(str(record.folder / trackers.TRACKED))
    events.Reload()
    found = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train_loss")]
    assert [(row["step"], row["train_loss"]) for row in record.history] == found
    engine.forget(record.folder)
    assert not (record.folder / trackers.TRACKED).exists()


def test_nobody_is_told_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "filter_trackers", lambda *_: pytest.fail("looked for a tracker"))
    record = runs.run(runs.configure(**QUICK, output_dir=str(tmp_path)))
    assert not (record.folder / trackers.TRACKED).exists()


def test_a_tracker_that_is_missing_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    config = runs.configure(**QUICK, log_with="trackio", output_dir=str(tmp_path))
    monkeypatch.setattr(runs, "prepare", lambda config: pytest.fail("prepared"))
    with pytest.raises(ConfigurationError, match="'trackio', which is not installed: pip install trackio, or leave"):
        runs.run(config)
    with pytest.raises(ConfigurationError, match="log_with"):
        runs.configure(**QUICK, log_with="mlflow")


def test_who_follows_a_run_is_no_part_of_it():
    for kind in (runs, pretraining):
        plain, followed = kind.configure(), kind.configure(log_with="tensorboard")
        assert plain.run_id == followed.run_id and plain.identity == followed.identity
        assert dataclasses.replace(followed, log_with=None) == plain and "log_with" in records.NOT_IDENTITY
