"""Runs on several processes: the steps of one process to float64's rounding, and one fate for all."""

import multiprocessing
import os
import signal
import socket
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch

from kdlib import checkpoints, pretraining, processes, runs, trainer
from kdlib.records import read_record
from tests import exact, together

TAUGHT = {
    "task": "mini-sst2",
    "method": "metadistil",
    "teacher": "tiny-1x64",
    "student": "tiny-1x32",
    "max_train": 97,
    "max_evaluation": 50,
    "teacher_epochs": 1,
    "feedback_fraction": 0.2,
    "feedback_batch_size": 7,
    "observe": True,
    "epochs": 2,
    "evaluate_every": 4,
    "checkpoint_every": 2,
    "device": "cpu",
}
# A student with dropout, so that each process has a random state that matters; 7 steps.
DROPPING = {
    "task": "mini-sst2",
    "method": "prokt",
    "teacher": "tiny-2x32",
    "student": "tutor-5.7m",
    "max_train": 33,
    "max_evaluation": 20,
    "batch_size": 5,
    "max_steps": 7,
    "epochs": 1,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "predict_test": False,
    "device": "cpu",
}
ON_TEXT = {
    "corpus": "mini-corpus",
    "max_lines": 60,
    "max_length": 16,
    "method": "tutor",
    "baseline": "running mean",
    "teacher": "tiny-2x32",
    "untrained_teacher": True,
    "student": "tiny-1x32",
    "steps": 3,
    "batch_size": 30,
    "evaluate_every": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def server():
    """Children of a process that has imported everything but computed nothing."""
    if counts := coverage.Coverage.current():
        os.environ[together.COUNTS] = counts.config.data_file
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.together"])
    yield context
    os.environ.pop(together.COUNTS, None)
    forkserver._forkserver._stop()


def start(server, target, size: int, folder: Path, *arguments: Any) -> list[int]:
    """So many processes that find each other; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        server.Process(target=target, args=(number, size, port, str(folder), *arguments)) for number in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
        child.kill()
    return [child.exitcode for child in children]


@pytest.fixture(scope="module")
def alone():
    return {case: together.made(case) for case in together.CASES}


@pytest.fixture(scope="module", params=[2, 3])
def several(server, request, tmp_path_factory):
    """What all processes have made; on three, a few cases."""
    folder, size = tmp_path_factory.mktemp("several"), request.param
    cases = [*together.CASES] if size == 2 else together.ON_THREE
    assert start(server, together.make_all, size, folder, cases) == [0] * size
    return [torch.load(folder / f"{number}.pt") for number in range(size)]


def test_every_method_makes_the_steps_of_one_process(alone, several):
    """Also the last batch of a single sample, and objectives that compare the samples of a batch."""
    for case in several[0].keys() & alone.keys():
        changes, logged = alone[case]
        for theirs, their_log in (found[case] for found in several):
            assert exact.error(theirs, changes) <= 1e-12, case
            assert all(theirs[name].any() for name in changes if changes[name].any()), case
            for ours, found in zip(logged, their_log, strict=True):
                assert found == pytest.approx(ours, rel=1e-10, abs=1e-12), case


def test_all_processes_end_with_the_same_weights_bit_for_bit(several):
    """Else they would drift apart in a long run."""
    for case in several[0].keys() & together.CASES.keys():
        for other in several[1:]:
            assert all(torch.equal(other[case][0][name], value) for name, value in several[0][case][0].items()), case


def test_every_method_is_among_the_cases():
    from kdlib.methods import METHODS
    from kdlib.methods import ON_TEXT as TEXT

    assert {type(settings) for settings in together.CASES.values()} == {*METHODS.values(), *TEXT.values()}


def test_what_one_process_does_and_says_all_hear(several):
    for number, words in enumerate(found["words"] for found in several):
        assert words["once"] == "by 0" and words["first alone"] == f"by {number}"
        assert words["failure"].startswith(("NonFiniteLossError", "RuntimeError: NonFiniteLossError"))
        assert "on training rows [0]" in words["failure"]
        assert words["anybody"] == (True, False) and words["told"] == [*range(len(several))]
        assert "differ in number:" in words["equal"]
        assert words["from first"] == [0, 7]
        rows, large = words["rows"]
        assert (
            rows.dtype == torch.bfloat16 and rows.tolist() == [*range(5)] and large.tolist() == 3 * [False] + 2 * [True]
        )


def test_a_single_process_sends_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather", None)
    batch = exact.batch()
    assert processes.by_rows(lambda rows: rows, batch) is batch and processes.summed(batch) is batch
    assert processes.Part(5).gathered(batch) is batch and processes.Part(5).own(batch) is batch
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", processes.MPI)
def test_mpi_is_told_what_to_start_instead(name, monkeypatch):
    monkeypatch.setenv(name, "2")
    with pytest.raises(RuntimeError, match=rf"one of 2 \({name} is set\).*torchrun"):
        processes.join()
    monkeypatch.setenv(name, "1")
    processes.join()
    assert processes.world_size() == 1


def words_of(parameters: dict, folder: Path) -> list[str]:
    return [f"{name}={value}" for name, value in {**parameters, "output_dir": folder / "runs"}.items()]


def folder_of(parameters: dict, folder: Path) -> Path:
    of = pretraining if "corpus" in parameters else runs
    return of.configure(**parameters, output_dir=str(folder / "runs")).folder


def ending(parameters: dict, folder: Path) -> dict[str, Any]:
    """What a run leaves."""
    record = read_record(folder_of(parameters, folder))
    return {
        "history": record.history,
        "metrics": record.metrics,
        "student": (record.folder / "student" / "model.safetensors").read_bytes(),
    }


@pytest.mark.parametrize("parameters", [TAUGHT, ON_TEXT], ids=["task", "text"])
def test_a_run_on_two_processes_has_the_record_of_one(server, tmp_path, parameters):
    """With the teacher's own run, feedback, last batches of another size, and evaluation."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, size in ((one, 1), (two, 2)):
        folder.mkdir()
        assert start(server, together.run, size, folder, None, words_of(parameters, folder)) == [0] * size
    first, second = (ending(parameters, folder) for folder in (one, two))
    assert second["metrics"] == pytest.approx(first["metrics"], abs=1e-4)
    for ours, theirs in zip(first["history"], second["history"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4)
    place = folder_of(parameters, two)
    assert (two / "0.txt").read_text().count(str(place)) == 1 and not (two / "1.txt").read_text()
    found, expected = read_record(place), read_record(folder_of(parameters, one))
    assert found.environment["processes"] == "2" and "processes" not in expected.environment
    ours, theirs = (sorted(path.name for path in each.folder.iterdir()) for each in (expected, found))
    assert theirs == ours


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(server, together.run, 2, folder, None, words_of(DROPPING, folder)) == [0, 0]
    return ending(DROPPING, folder)


def test_one_is_killed_the_other_ends_and_both_go_on_to_the_same_result(server, undisturbed, tmp_path):
    """Between two checkpoints, in mid-step.  Catches a random state that one process does not get back."""
    codes = start(server, together.run, 2, tmp_path, (1, 12, signal.SIGKILL), words_of(DROPPING, tmp_path))
    assert codes == [1, -signal.SIGKILL]
    said = (tmp_path / "0.txt").read_text()
    assert "another process of this run is gone" in said and "goes on from the checkpoint" in said
    assert "Traceback" not in said
    path = folder_of(DROPPING, tmp_path) / trainer.CHECKPOINT
    assert checkpoints.read_tensors(path)[1]["training"]["step"] == 4
    assert start(server, together.run, 2, tmp_path, None, words_of(DROPPING, tmp_path)) == [0, 0]
    assert ending(DROPPING, tmp_path) == undisturbed


def test_one_is_asked_to_end_all_stop_at_the_same_step_and_as_many_go_on(server, undisturbed, tmp_path):
    codes = start(server, together.run, 2, tmp_path, (1, 9, signal.SIGTERM), words_of(DROPPING, tmp_path))
    assert codes == [130, 130]
    assert "interrupted after step 5 of 7" in (tmp_path / "0.txt").read_text()
    path = folder_of(DROPPING, tmp_path) / trainer.CHECKPOINT
    assert checkpoints.read_tensors(path)[1]["training"]["step"] == 5
    assert start(server, together.run, 1, tmp_path, None, words_of(DROPPING, tmp_path)) == [1]
    assert "was written by a run on 2 processes, and now there is 1" in (tmp_path / "0.txt").read_text()
    assert start(server, together.run, 2, tmp_path, None, words_of(DROPPING, tmp_path)) == [0, 0]
    assert ending(DROPPING, tmp_path) == undisturbed
