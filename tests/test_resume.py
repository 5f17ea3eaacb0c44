"""Runs that are really killed: SIGKILL at chosen places, then the same command again.

Each case starts a process that kills itself at one place of one run, checks that it died of it, starts the run again
and compares student, history and metrics with an undisturbed run, bit for bit.
"""

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest

from kdlib import checkpoints, engine, files, folders, glue, models, pretraining, runs, trainer
from kdlib.learner import Learner
from kdlib.methods import ikd, tutor
from tests import quick

CONFIG = {
    "task": "mini-sst2",
    "method": "kd",
    "teacher": "tiny-1x64",
    "student": "tiny-1x32",
    "max_train": 96,
    "max_evaluation": 50,
    "teacher_epochs": 3,
    "epochs": 3,  # 9 steps each
    "evaluate_every": 4,
    "checkpoint_every": 2,
    "device": "cpu",
}

# A teacher that learns: 3 steps of fine-tuning, then 9 of both networks in turns; the feedback data in batches of 8.
TEACHING = {
    **CONFIG,
    "method": "metadistil",
    "teacher_epochs": 1,
    "feedback_fraction": 0.2,
    "feedback_batch_size": 8,
    "observe": True,
}

# Both networks in one step; the exams are other batches of the training set.
JOINT = {**CONFIG, "method": "ikd", "teacher_epochs": 1, "exam": "train", "feedback_batch_size": 8}
# Looks at the feedback at every second step: which ones must not depend on where the run began.
GOOD_TEACHING = {**TEACHING, "method": "lgtm", "feedback_every": 2, "checkpoint_every": 3}

# Tutor-KD on text, 9 steps: the masks belong to the step, the words that are drawn to the random state, and the running
# mean of the rewards to the tutor.
TUTORED = {
    "corpus": "mini-corpus",
    "max_lines": 200,
    "max_length": 32,
    "method": "tutor",
    "teacher": "tiny-2x32",
    "untrained_teacher": True,
    "student": "tiny-1x32",
    "steps": 9,
    "batch_size": 8,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "baseline": "running mean",
    "order": "in turns",
    "device": "cpu",
}

# A place is a function and the number of the call to it that does not return: (holder, name, call, before or after).
# Teacher and student train in the same process, 9 steps each, so calls 10 to 18 of `minimise` are the student's.
PLACES = {
    "teacher-first-step": (Learner, "minimise", 1, "after"),
    "teacher-mid-run": (Learner, "minimise", 6, "before"),
    "teacher-saved-not-recorded": (engine, "write_record", 1, "before"),
    "teacher-logits-half-written": (files.os, "replace", 7, "before"),
    "student-first-step": (Learner, "minimise", 10, "before"),
    "student-between-checkpoints": (Learner, "minimise", 14, "after"),
    "student-last-step": (Learner, "minimise", 18, "after"),
    "student-evaluating": (models, "logits", 19, "before"),
    "best-written-checkpoint-not": (checkpoints, "save", 6, "before"),
    "checkpoint-half-written": (files.os, "replace", 11, "before"),
    "student-folder-half-written": (runs, "save_pretrained", 2, "before"),
    "student-saved-not-recorded": (engine, "write_record", 2, "before"),
}
# Calls 4, 6, … of `minimise` are the teacher's, 5, 7, … the student's; the teacher's folder is saved after its own run.
TEACHING_PLACES = {
    "teacher-stepped-student-not": (Learner, "minimise", 14, "after"),
    "teacher-folder-written-student-not": (runs, "save_pretrained", 3, "before"),
}
JOINT_PLACES = {
    "both-stepped-between-checkpoints": (ikd, "minimise_together", 7, "after"),
    "examined-not-stepped": (ikd, "minimise_together", 6, "before"),
}
# A step calls `minimise` for the tutor's turn, then `minimise_together`; three checkpoints, then the tutor's weights.
TUTORED_PLACES = {
    "tutor-rewarded-student-not": (Learner, "minimise", 5, "after"),
    "tutored-between-checkpoints": (tutor, "minimise_together", 5, "after"),
    "tutored-just-after-a-checkpoint": (tutor, "minimise_together", 7, "before"),
    "tutored-evaluating": (tutor, "take_turn", 12, "before"),
    "student-saved-tutor-not": (checkpoints, "write_tensors", 4, "before"),
    "tutored-not-recorded": (engine, "write_record", 1, "before"),
}
GOOD_TEACHING_PLACES = {"between-two-looks": (Learner, "minimise", 13, "after")}


def run(folder: str, place: str | None, places_hit, parameters: dict) -> None:
    """In a child process: run, and die at the place."""
    import torch

    torch.set_num_threads(1)
    glue.load = quick.few_to_test(glue.load)
    if place is not None:
        places = {**PLACES, **TEACHING_PLACES, **JOINT_PLACES, **GOOD_TEACHING_PLACES, **TUTORED_PLACES}
        holder, name, call, when = places[place]
        original = getattr(holder, name)
        count = 0

        def deadly(*arguments, **options):
            nonlocal count
            count += 1
            if count == call and when == "before":
                places_hit.value = 1
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if count == call:
                places_hit.value = 1
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(holder, name, deadly)
    of = pretraining if "corpus" in parameters else runs
    of.run(of.configure(**parameters, output_dir=folder))


@pytest.fixture(scope="module")
def processes():
    """Children of a server that has imported everything but computed nothing: quick to start and safe to fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    yield context
    forkserver._forkserver._stop()  # or it stays, as large as torch, and other tests measure it with their children


def start(processes, folder: Path, place: str | None = None, parameters: dict = CONFIG) -> tuple[int, bool]:
    hit = processes.Value("i", 0)
    process = processes.Process(target=run, args=(str(folder), place, hit, parameters))
    process.start()
    process.join(120)
    return process.exitcode, bool(hit.value)


def ending(folder: Path, parameters: dict = CONFIG) -> dict:
    """Everything a run leaves that must not depend on interruptions."""
    config = runs.configure(**parameters, output_dir=str(folder))
    teacher = config.folder / engine.TEACHER_FOLDER / "model.safetensors"
    record = runs.read_record(config.folder)
    return {
        "history": record.history,
        "metrics": record.metrics,
        "best_step": record.best_step,
        "oracle": record.oracle,
        "student": (config.folder / "student" / "model.safetensors").read_bytes(),
        "teacher": teacher.read_bytes() if config.settings.teaches == "learning" else None,
        "predictions": (config.folder / "mini-sst2.tsv").read_bytes(),
        "files": sorted(p.name for p in config.folder.iterdir()),
    }


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(processes, folder) == (0, False)
    return ending(folder)


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_started_again_it_ends_the_same(processes, undisturbed, tmp_path, place):
    code, hit = start(processes, tmp_path, place)
    assert hit and code == -signal.SIGKILL
    assert start(processes, tmp_path)[0] == 0
    assert ending(tmp_path) == undisturbed


@pytest.fixture(scope="module")
def undisturbed_teaching(processes, tmp_path_factory):
    ends = {}
    for parameters in (TEACHING, JOINT):
        folder = tmp_path_factory.mktemp("undisturbed")
        assert start(processes, folder, None, parameters) == (0, False)
        ends[parameters["method"]] = ending(folder, parameters)
    return ends


@pytest.mark.parametrize(
    ("parameters", "place"),
    [*((TEACHING, place) for place in TEACHING_PLACES), *((JOINT, place) for place in JOINT_PLACES)],
    ids=[*TEACHING_PLACES, *JOINT_PLACES],
)
def test_killed_while_the_teacher_learns_both_networks_end_the_same(
    processes, undisturbed_teaching, tmp_path, parameters, place
):
    """Catches a teacher, its optimiser or the place in the feedback data that is not restored with the student."""
    code, hit = start(processes, tmp_path, place, parameters)
    assert hit and code == -signal.SIGKILL
    assert start(processes, tmp_path, None, parameters)[0] == 0
    assert ending(tmp_path, parameters) == undisturbed_teaching[parameters["method"]]


@pytest.mark.parametrize("place", GOOD_TEACHING_PLACES)
def test_killed_between_two_looks_at_the_feedback_it_looks_at_the_same_steps(processes, tmp_path, place):
    assert start(processes, tmp_path / "undisturbed", None, GOOD_TEACHING) == (0, False)
    code, hit = start(processes, tmp_path / "killed", place, GOOD_TEACHING)
    assert hit and code == -signal.SIGKILL
    assert start(processes, tmp_path / "killed", None, GOOD_TEACHING)[0] == 0
    assert ending(tmp_path / "killed", GOOD_TEACHING) == ending(tmp_path / "undisturbed", GOOD_TEACHING)


def tutored_ending(folder: Path) -> dict:
    """The tutor's tensors, not its file: a header that `safetensors` writes lists its entries in any order."""
    record = runs.read_record(pretraining.configure(**TUTORED, output_dir=str(folder)).folder)
    tensors, _ = checkpoints.read_tensors(record.folder / pretraining.TUTOR_WEIGHTS)
    return {
        "history": record.history,
        "metrics": record.metrics,
        "best_step": record.best_step,
        "samples": record.samples,
        "student": (record.folder / "student" / "model.safetensors").read_bytes(),
        "tutor": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "files": sorted(p.name for p in record.folder.iterdir()),
    }


@pytest.fixture(scope="module")
def undisturbed_tutoring(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(processes, folder, None, TUTORED) == (0, False)
    return tutored_ending(folder)


@pytest.mark.parametrize("place", TUTORED_PLACES)
def test_killed_while_a_tutor_teaches_student_and_tutor_end_the_same(processes, undisturbed_tutoring, tmp_path, place):
    """Catches masks, draws, the place in the text or the running mean of the rewards that begin anew."""
    code, hit = start(processes, tmp_path, place, TUTORED)
    assert hit and code == -signal.SIGKILL
    assert start(processes, tmp_path, None, TUTORED)[0] == 0
    assert tutored_ending(tmp_path) == undisturbed_tutoring


def test_killed_again_and_again(processes, undisturbed, tmp_path):
    for place in ("teacher-mid-run", "teacher-saved-not-recorded", "teacher-first-step", "student-folder-half-written"):
        start(processes, tmp_path, place)
    assert start(processes, tmp_path)[0] == 0
    assert ending(tmp_path) == undisturbed


def test_killed_from_outside_at_odd_moments(processes, undisturbed, tmp_path):
    """The parent kills; the moments are whatever the machine makes of them."""
    for delay in (0.3, 0.6, 0.9, 1.2, 1.5):
        process = processes.Process(target=run, args=(str(tmp_path), None, processes.Value("i", 0), CONFIG))
        process.start()
        process.join(delay)
        process.kill()
        process.join()
    assert start(processes, tmp_path)[0] == 0
    assert ending(tmp_path) == undisturbed


def test_the_checkpoint_is_small_and_one_file(processes, tmp_path):
    code, _ = start(processes, tmp_path, "student-between-checkpoints")
    assert code == -signal.SIGKILL
    folder = runs.configure(**CONFIG, output_dir=str(tmp_path)).folder
    assert sorted(p.name for p in folder.iterdir()) == [folders.LOCK, trainer.BEST, trainer.CHECKPOINT]
    step = checkpoints.read_tensors(folder / trainer.CHECKPOINT)[1]["training"]["step"]
    assert step == 4
