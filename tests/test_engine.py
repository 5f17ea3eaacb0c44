"""A run is prepared, trained and finished once: who computes it, what is reused, cleared and kept."""

import dataclasses
import shutil
import types
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kdlib import engine, folders, records, trainer
from kdlib.checkpoints import CheckpointError
from kdlib.trainer import TrainingInterruptedError
from tests import toy

SCHEDULE = trainer.Schedule(epochs=2, batch_size=8, evaluate_every=4)  # 48 samples: 12 steps


@dataclass
class Config:
    """The least that is a configuration."""

    home: Path
    identity: dict[str, Any] = field(default_factory=lambda: {"rate": 1e-3})
    contents: dict[str, str] = field(default_factory=dict)
    max_seconds: float | None = None
    log_with: str | None = None

    @property
    def flat(self) -> dict[str, Any]:
        return {**self.identity, "max_seconds": self.max_seconds}

    @property
    def run_id(self) -> str:
        return engine.name_of("toy", {**self.identity, **self.contents})

    @property
    def folder(self) -> Path:
        return self.home / self.run_id


def prepared(config: Config, calls: list[str]) -> engine.Prepared:
    """A toy run, which notes what is done."""
    calls.append("prepared")
    who, data = toy.student(total_steps=12), toy.encoded()

    def finish(result: trainer.Result) -> engine.Findings:
        calls.append("finished")
        (config.folder / engine.STUDENT).mkdir()
        return engine.Findings(metrics=result.best_metrics, samples={"train": len(data)}, parameters=7, notes=["toy"])

    return engine.Prepared(toy.training(who, data, SCHEDULE), finish)


def run(config: Config, calls: list[str] | None = None) -> records.RunRecord:
    return engine.run(config, lambda: prepared(config, [] if calls is None else calls))


@pytest.fixture
def config(tmp_path):
    return Config(tmp_path / "runs")


def refused():
    pytest.fail("prepared again")


def test_a_run_is_prepared_and_finished_once_and_then_read(config):
    calls: list[str] = []
    record = run(config, calls)
    assert calls == ["prepared", "finished"]
    assert (record.run_id, record.config, record.folder) == (config.run_id, config.flat, config.folder)
    assert [row["step"] for row in record.history] == [4, 8, 12] and record.best_step in (4, 8, 12)
    assert (record.samples, record.parameters, record.notes) == ({"train": 48}, 7, ["toy"])
    assert {path.name for path in config.folder.iterdir()} == {folders.LOCK, records.RECORD, engine.STUDENT}
    assert engine.run(config, refused) == record == records.read_record(config.folder)


def test_a_finished_run_is_read_where_nothing_can_be_written(config, monkeypatch):
    record = run(config)
    monkeypatch.setattr(engine, "alone_in", lambda folder: pytest.fail("locked"))
    assert engine.run(config, refused) == record


def test_a_run_that_another_process_computes_is_waited_for(config, tmp_path):
    """The runs that share a teacher start side by side; one of them fine-tunes it."""
    record, other = run(config), dataclasses.replace(config, home=tmp_path / "other")
    with ThreadPoolExecutor(1) as pool:
        with folders.alone_in(other.folder):
            waiting = pool.submit(engine.run, other, refused)
            assert not wait([waiting], timeout=0.5).done
            shutil.copy(record.folder / records.RECORD, other.folder)
        assert waiting.result(30).metrics == record.metrics


def test_what_a_finished_run_left_is_gone_when_it_is_computed_again(config):
    """Its record was deleted: networks, logits and predictions may be of other data."""
    stale = (engine.STUDENT, engine.TEACHER_FOLDER), (f"{trainer.LOGITS}old.safetensors", "toy.tsv")
    for folder in stale[0]:
        (config.folder / folder / "deep").mkdir(parents=True)
    for file in stale[1]:
        (config.folder / file).touch()
    left: list[str] = []

    def look():
        left.extend(path.name for path in config.folder.iterdir())
        return prepared(config, [])

    engine.run(config, look)
    assert left == [folders.LOCK]


def test_a_run_that_ran_out_of_time_goes_on_and_ends_the_same(config, tmp_path):
    whole, calls = run(dataclasses.replace(config, home=tmp_path / "whole")), []
    short = dataclasses.replace(config, max_seconds=1e-9)
    for step in (1, 2):
        with pytest.raises(TrainingInterruptedError, match=f"after step {step} of 12"):
            run(short, calls)
        assert (config.folder / trainer.CHECKPOINT).exists() and not (config.folder / records.RECORD).exists()
    record = run(config, calls)
    assert calls == ["prepared"] * 3 + ["finished"]
    assert record.history == whole.history and record.metrics == whole.metrics
    assert not list(config.folder.glob("*.safetensors"))


def test_the_time_counts_from_before_the_preparation(config, monkeypatch):
    clock, given = iter([100.0, 130.0]), []
    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(trainer, "train", lambda *_, max_seconds, **__: given.append(max_seconds) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(dataclasses.replace(config, max_seconds=50.0))
    assert given == [20.0]


@pytest.mark.parametrize("what", ["identity", "contents"])
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(config, what, monkeypatch):
    """Where a name was given to another run, by hand or by chance."""
    monkeypatch.setattr(Config, "run_id", "toy")
    with pytest.raises(TrainingInterruptedError):
        run(dataclasses.replace(config, max_seconds=1e-9))
    other = dataclasses.replace(config, **{what: {"rate": 2e-3}})
    with pytest.raises(CheckpointError, match=r"another run \(rate: 0.001 there, 0.002 now\)"):
        run(other)


def test_a_run_is_forgotten_with_everything_that_it_left_but_for_what_is_not_its_own(config):
    run(config)
    for name in (trainer.CHECKPOINT, trainer.BEST, "toy.tsv", "notes.txt"):
        (config.folder / name).touch()
    engine.forget(config.folder)
    assert {path.name for path in config.folder.iterdir()} == {folders.LOCK, "notes.txt"}
    engine.forget(config.folder / "absent")
    assert not (config.folder / "absent").exists()


def test_a_name_that_is_too_long_for_a_file_is_a_folder_that_cannot_be_written(config, monkeypatch):
    monkeypatch.setattr(Config, "run_id", "x" * 300)
    with pytest.raises(CheckpointError, match=r"cannot write to .*choose another output_dir"):
        engine.run(config, refused)


def test_names_tell_identities_apart_and_no_order_does():
    assert engine.name_of("a/b", {"x": 1, "y": 2}) == engine.name_of("a/b", {"y": 2, "x": 1})
    assert engine.name_of("a/b", {"x": 1}) != engine.name_of("a/b", {"x": 2})
    assert engine.name_of("a/b", {}).startswith("a-b-")
