"""Studies on real workers: the records of runs by hand, whatever is killed on the way."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from dask.distributed import Client
from distributed.deploy import spec

from kdlib import __main__, cluster, pretraining, runs
from kdlib.records import read_record
from kdlib.study import Study

COMMON = {
    "task": "mini-sst2",
    "teacher": "tiny-1x64",
    "student": "tiny-1x32",
    "max_train": 96,
    "max_evaluation": 50,
    "epochs": 3,
    "teacher_epochs": 1,
    "device": "cpu",
}
ARMS = {"alone": {"method": "fine_tune"}, "fixed": {"method": "kd", "alpha": [0.2, 0.8]}, "online": {"method": "prokt"}}


def written(folder: Path, name: str = "a-study", **more) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yml"
    common = {**COMMON, "output_dir": str(folder / "runs"), **more.pop("common", {})}
    sheet = {"common": common, "arms": ARMS, "seeds": "0-1", **more}
    path.write_text(yaml.safe_dump(sheet, sort_keys=False))
    return path


def kept(study: Study) -> dict[str, dict]:
    """What counts in the records: everything but where and when."""
    found = {}
    for path in study.records.glob("*.json"):
        record = json.loads(path.read_text())
        found[path.stem] = {
            name: record[name] for name in ("run_id", "config", "metrics", "history", "best_step", "oracle")
        }
    return found


@pytest.fixture(scope="module")
def workers():
    with cluster.local(2) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(workers, tmp_path_factory):
    study = Study(written(tmp_path_factory.mktemp("undisturbed")))
    assert cluster.carry_out(study, workers) == []
    return study


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "kdlib", "study", str(path), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "KDLIB_PROGRESS": "0", "PYTHONPATH": str(Path(__file__).parents[1])}


def test_every_unit_has_the_record_of_a_run_by_hand(undisturbed, tmp_path):
    assert {path.stem for path in undisturbed.records.glob("*.json")} == {unit.name for unit in undisturbed.units}
    unit = next(unit for unit in undisturbed.units if unit.arm == "online")
    by_hand = runs.run(runs.configure(**{**unit.parameters, "output_dir": str(tmp_path)}))
    record = kept(undisturbed)[unit.name]
    assert (record["metrics"], record["history"]) == (by_hand.metrics, by_hand.history)
    assert record["config"] == {**by_hand.config, "output_dir": "_runs"}


def test_a_teacher_is_computed_once_for_all_of_its_students(undisturbed):
    teachers = {json.loads(undisturbed.record(unit).read_text())["teacher"] for unit in undisturbed.units}
    assert len(teachers - {None}) == 1
    (name,) = teachers - {None}
    assert (Path(undisturbed.sheet.common["output_dir"]) / name / "record.json").exists()


def test_what_has_a_record_is_not_computed_again_and_a_changed_file_runs_what_changed(workers, undisturbed, tmp_path):
    path = written(
        tmp_path, records=str(undisturbed.records), arms={**ARMS, "alone": {"method": "fine_tune", "epochs": 2}}
    )
    study, before = Study(path), {one: one.stat().st_mtime_ns for one in undisturbed.records.glob("*.json")}
    todo = cluster.missing(study, study.units)
    assert [(unit.arm, unit.seed) for unit in todo] == [("alone", 0), ("alone", 1)]
    assert cluster.carry_out(study, workers) == []
    assert {one: one.stat().st_mtime_ns for one in before} == before
    for unit in todo:
        study.record(unit).unlink()


def test_what_fails_is_told_at_the_end_and_the_others_go_on(workers, tmp_path):
    arms = {"broken": {"method": "kd", "teacher": str(tmp_path / "nowhere")}, **ARMS}
    study = Study(written(tmp_path, arms=arms, seeds=0))
    (failed,) = cluster.carry_out(study, workers)
    assert failed.unit.arm == "broken" and "broken, seed 0" in str(failed) and "nowhere" in str(failed)
    assert len(kept(study)) == 4


def test_before_hours_are_spent_functions_and_folders_are_there(workers, tmp_path):
    arms = {"a": {"method": "kd", "measure": "tests.test_cluster:no_such_function"}}
    study = Study(written(tmp_path, arms=arms))
    with pytest.raises(ValueError, match="no_such_function', and there is no such function"):
        cluster.conduct(study, study.units, workers)
    study = Study(written(tmp_path))
    study.records.write_text("a file")
    with pytest.raises(OSError, match=str(study.records)):
        cluster.conduct(study, study.units, workers)


def no_number(job):
    return {"metrics": {"value": float("nan")}}


def test_a_measurement_is_json_without_nan(tmp_path):
    study = Study(written(tmp_path, arms={"a": {"method": "kd", "measure": "tests.test_cluster:no_number"}}))
    with pytest.raises(ValueError, match="no_number returns what JSON cannot hold"):
        cluster.computed(cluster.Job(study.units[0], tmp_path))


def test_trials_make_a_table_and_the_best_of_it_is_taken(workers, tmp_path):
    choose = {"arms": {"tried": {"method": "kd", "learning_rate": [1e-6, 2e-3]}}, "seeds": "100-101"}
    choose["by"] = ["method", "learning_rate"]
    arms = {"fixed": {"method": "kd", "learning_rate": "chosen"}}
    study = Study(written(tmp_path, choose=choose, arms=arms, seeds=0))
    assert cluster.choose(study, workers) == []
    table = cluster.tried(study)
    assert list(table["count"]) == [2, 2] and (table["worst"] <= table["mean"]).all()
    again = Study(study.path)
    best = table.loc[table["worst"].idxmax(), "learning_rate"]
    assert [unit.parameters["learning_rate"] for unit in again.units] == [best]
    assert [path.name for path in study.records.iterdir()] == ["choices.csv"], "trials are no results"


def test_only_cells_whose_claims_are_open_get_more_seeds(workers, undisturbed, tmp_path):
    """A claim with a huge margin is decided at its first look, one with a tiny margin is not."""
    claims = [
        {"arm": "online", "against": "alone", "metric": "test/accuracy", "margin": 1e6},
        {"arm": "fixed", "against": "alone", "where": {"alpha": 0.2}, "metric": "test/accuracy", "margin": 1e-9},
    ]
    quick = {"epochs": 1, "max_steps": 1}
    study = Study(written(tmp_path, claims=claims, seeds="0-3", looks=[2], common=quick))
    assert cluster.carry_out(study, workers) == []
    seeds = {arm: sorted(u.seed for u in study.units if u.arm == arm and study.record(u).exists()) for arm in ARMS}
    assert seeds["online"] == [0, 1] and seeds["alone"] == [0, 1, 2, 3]
    assert sorted(seeds["fixed"]) == sorted([0, 1, 2, 3] * 2), "a cell without a claim has all its seeds"
    assert next(iter(study.verdicts()["alone"])) == "equal"


def test_a_folder_stands_for_a_hubs_name_in_the_run_and_not_in_the_record(root, workers, tmp_path):
    common = {"source": "somebody/some-data", "teacher": None, "teacher_epochs": None, "student": "minilm"}
    common |= {"max_steps": 1, "max_train": 16, "epochs": 1, "student_layers": 1, "max_length": 8}
    arms = {"alone": {"method": "fine_tune"}}
    study = Study(written(tmp_path, common=common, arms=arms, seeds=0))
    assert cluster.carry_out(study, workers, folders={"somebody/some-data": str(root / "data" / "miniglue")}) == []
    ((name, record),) = kept(study).items()
    assert name == study.units[0].config.asked_id == record["run_id"]
    assert record["config"]["source"] == "somebody/some-data" and str(root) not in json.dumps(record)


def test_data_that_have_changed_are_another_study(root, workers, tmp_path):
    """A record is named after what was asked; the data under that name are its own affair."""
    shutil.copytree(root / "data" / "miniglue", tmp_path / "data", symlinks=False)
    common = {"source": str(tmp_path / "data"), "teacher": None, "teacher_epochs": None, "student": "minilm"}
    common |= {"max_steps": 1, "max_train": 16, "epochs": 1, "student_layers": 1, "max_length": 8}
    study = Study(written(tmp_path, common=common, arms={"alone": {"method": "fine_tune"}}, seeds=0))
    assert cluster.carry_out(study, workers) == []
    assert cluster.carry_out(Study(study.path), workers) == []
    (changed,) = (tmp_path / "data" / "mini-sst2").glob("train-00000*")
    lines = changed.read_text().splitlines()
    changed.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(ValueError, match=r"was made from .*sha256.*move the records away"):
        cluster.carry_out(Study(study.path), workers)


def test_what_comes_after_a_run_is_in_its_record(workers, undisturbed, tmp_path):
    """Against the two runs by hand."""
    then = [{"task": "mini-sst2", "max_train": 40, "max_evaluation": 20, "epochs": 1}]
    common = {"corpus": "mini-corpus", "steps": 2, "evaluate_every": 2, "max_lines": 40, "device": "cpu"}
    path = tmp_path / "text.yml"
    sheet = {"common": {**common, "output_dir": str(tmp_path / "runs")}, "seeds": 3}
    path.write_text(yaml.safe_dump({**sheet, "arms": {"soft labels": {"method": "soft_labels", "then": then}}}))
    study = Study(path)
    assert cluster.carry_out(study, workers) == []
    (record,) = (read_record(one) for one in study.records.glob("*.json"))
    distilled = pretraining.run(pretraining.configure(**common, method="soft_labels", seed=3, output_dir=str(tmp_path)))
    by_hand = {"student": str(distilled.folder / "student"), "method": "fine_tune", "seed": 3, "device": "cpu"}
    after = runs.run(runs.configure(**then[0], **by_hand, output_dir=str(tmp_path)))
    assert record.run_id == "soft-labels-seed3"
    assert record.metrics == {**distilled.metrics, **{f"mini-sst2/{n}": v for n, v in after.metrics.items()}}
    ((asked,),) = record.asked.values()
    assert asked.items() >= {**then[0], "seed": 3, "method": "fine_tune"}.items() and str(tmp_path) not in str(asked)


def test_what_a_run_leaves_is_removed_only_if_asked_and_after_its_record_is_there(workers, undisturbed, tmp_path):
    unit = undisturbed.units[0]
    assert (unit.config.folder / "student").exists()
    study = Study(written(tmp_path, keep_folders=False, arms={"alone": {"method": "fine_tune"}}, seeds=0))
    assert cluster.carry_out(study, workers) == []
    assert study.record(study.units[0]).exists() and not study.units[0].config.folder.exists()


# --- Kills ---


def started(path: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(path, *more), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def some_records(study: Study, count: int = 1):
    return lambda: len([*study.records.glob("*.json")]) >= count


def in_mid_run(study: Study, since: float = 0.0):
    """A checkpoint is there, written after that moment: a run has begun and has not ended."""

    def found() -> bool:
        with contextlib.suppress(FileNotFoundError):  # that run has ended meanwhile
            places = Path(study.sheet.common["output_dir"]).glob("*/checkpoint*")
            return any(path.stat().st_mtime > since for path in places)
        return False

    return found


def told_to_end(study: Study) -> None:
    """The command, while runs are under way, gets what a batch system sends before its limit."""
    begun = time.time()
    with started(study.path, "--workers", "2") as process:
        wait_for(in_mid_run(study, begun))
        children, asked = workers_of(process), time.monotonic()
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 30 and len(children) >= 2
    assert process.returncode == __main__.INTERRUPTED and said.strip() == STOPPED
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == [], "they would work on for nobody"


STOPPED = "stopped: the same command goes on with what is missing"


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline()) or "dask" in child.name()]


def same(study: Study, other: Study) -> None:
    """The same records, but for how often they saved."""
    ours, theirs = kept(study), kept(other)
    for found in (*ours.values(), *theirs.values()):
        found["config"].pop("checkpoint_every")
    assert ours == theirs


def test_a_worker_is_killed_then_everything_then_it_is_told_to_end_and_the_same_command_goes_on(undisturbed, tmp_path):
    study = Study(written(tmp_path, common={"checkpoint_every": 1}))
    with started(study.path, "--workers", "2") as process:
        wait_for(in_mid_run(study))
        max(workers_of(process), key=lambda child: child.cpu_times().user).send_signal(signal.SIGKILL)
        wait_for(some_records(study, 2))  # another one has taken its place
        wait_for(in_mid_run(study))
        os.killpg(process.pid, signal.SIGKILL)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in study.records.glob("*.json")}
    assert 2 <= len(before) < len(study.units)
    told_to_end(study)
    assert len([*study.records.glob("*.json")]) < len(study.units)
    assert subprocess.run(command(study.path), env=environment(), timeout=200).returncode == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    same(study, undisturbed)


def test_an_end_while_the_workers_start_leaves_nothing_to_complain_of(monkeypatch):
    """Dask would close a cluster that is half there when the process ends, and fail."""

    def interrupted(**_):
        raise KeyboardInterrupt

    left_out = []
    monkeypatch.setattr(cluster, "LocalCluster", interrupted)
    monkeypatch.setattr(cluster.atexit, "unregister", left_out.append)
    with pytest.raises(KeyboardInterrupt), cluster.local(1):
        pass
    assert left_out == [spec.close_clusters]


@contextlib.contextmanager
def scheduler(folder: Path):
    """A scheduler of somebody else, with one worker; its address and its process."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    quiet = {"env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    place = ["--scheduler-file", str(file)]
    program = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    boss = subprocess.Popen([*program, "--no-dashboard", *place], **quiet)
    helper = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--resources", "GPU=1"]
    worker = subprocess.Popen([*helper, "--no-dashboard", *place], cwd=folder, **quiet)
    try:
        wait_for(file.exists)
        yield json.loads(file.read_text())["address"], boss
    finally:
        for process in (worker, boss):
            process.kill()
            process.wait()


def test_a_scheduler_that_runs_is_used_and_its_death_is_told(workers, undisturbed, tmp_path):
    study = Study(written(tmp_path, common={"checkpoint_every": 1}))
    with scheduler(tmp_path) as (address, boss):
        with started(study.path, "--scheduler", address, "--resources", "GPU=1") as process:
            wait_for(some_records(study))
            boss.kill()
            said, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "the scheduler is gone" in said and "goes on" in said, said
        assert "Traceback" not in said
    assert cluster.carry_out(study, workers) == []
    same(study, undisturbed)


def test_jobs_of_a_queue_are_workers(undisturbed, tmp_path):
    """By dask-jobqueue's own queue, whose jobs are processes of this machine."""
    study = Study(written(tmp_path, seeds=0, arms={"alone": {"method": "fine_tune"}}))
    told = {"DASK_JOBQUEUE__LOCAL__CORES": "1", "DASK_JOBQUEUE__LOCAL__MEMORY": "2GB"}
    ended = subprocess.run(
        command(study.path, "--queue", "local", "--jobs", "1"), env=environment() | told, timeout=200, cwd=tmp_path
    )
    assert ended.returncode == 0
    (name,) = kept(study)
    assert kept(study)[name]["history"] == kept(undisturbed)[name]["history"]


def test_nobody_else_on_the_machine_can_give_the_workers_work(workers):
    address = workers.scheduler.address
    assert address.startswith("tls://127.0.0.1")
    with pytest.raises(OSError), Client(re.sub("tls", "tcp", address), timeout="2s"):
        pass


# --- The command ---


def test_a_plan_says_what_there_is_and_what_is_to_do(undisturbed, capsys, tmp_path):
    assert __main__.main(["study", str(undisturbed.path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fixed +2 +2 +4 +0", out) and "to do:" not in out
    path = written(tmp_path, records=str(undisturbed.records), seeds="0-2")
    assert __main__.main(["study", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fixed +2 +3 +4 +2", out)
    assert "4 runs to do: about" in out


def test_a_plan_without_a_table_of_choices_is_that_of_the_trials(capsys, tmp_path):
    tried = {"method": "kd", "learning_rate": [1e-3, 2e-3]}
    choose = {"arms": {"tried": tried}, "seeds": "100-102", "by": ["learning_rate"]}
    arms = {"alone": {"method": "fine_tune"}, "fixed": {"method": "kd", "learning_rate": "chosen"}}
    path = written(tmp_path, choose=choose, arms=arms)
    assert __main__.main(["study", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tried +2 +3 +0 +6", out) and "6 runs to do" in out
    assert "what --choose tries" in out and str(tmp_path / "a-study" / "choices.csv") in out
    assert __main__.main(["study", str(path)]) == __main__.WRONG
    assert "run the study with --choose" in capsys.readouterr().err
    path = written(tmp_path, choose=choose, arms={**arms, "wrong": {"method": "kdd"}})
    assert __main__.main(["study", str(path), "--dry-run"]) == __main__.WRONG
    assert "did you mean 'kd'" in capsys.readouterr().err


def test_a_finished_study_starts_no_workers(undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "local", None)
    assert __main__.main(["study", str(undisturbed.path)]) == 0
    assert "alone" in capsys.readouterr().out


def test_mistakes_end_with_status_2_before_any_work(tmp_path, capsys):
    path = written(tmp_path, arms={"a": {"method": "kdd"}})
    assert __main__.main(["study", str(path)]) == __main__.WRONG
    assert "did you mean 'kd'" in capsys.readouterr().err
    assert __main__.main(["study", str(tmp_path / "none.yml")]) == __main__.WRONG
    good = written(tmp_path)
    assert __main__.main(["study", str(good), "--resources", "GPU"]) == __main__.WRONG
    assert "GPU=1" in capsys.readouterr().err
    assert __main__.main(["study", str(good), "--data", "glue"]) == __main__.WRONG
    assert "NAME=FOLDER" in capsys.readouterr().err
