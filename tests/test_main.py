"""The command line: what it understands, what it says when something is wrong, and its exit status."""

import dataclasses
import subprocess
import sys

import pytest

from kdlib import (
    __main__,
    cards,
    checkpoints,
    doctor,
    exports,
    pretraining,
    processes,
    records,
    report,
    runs,
    submission,
)
from kdlib.learner import NonFiniteLossError
from kdlib.methods import METHODS, ON_TEXT
from kdlib.trainer import TrainingInterruptedError

RECORD = records.RunRecord(
    run_id="a-run",
    config={"task": "mini-sst2", "method": "kd", "seed": 0},
    metrics={"validation/accuracy": 0.875},
    best_step=1,
    history=[],
    seconds=1.0,
    samples={"train": 8},
    parameters=1,
    teacher=None,
    oracle={},
    environment={},
    git_commit=None,
    finished="",
)


@pytest.fixture
def computed(monkeypatch):
    """The configurations that would have been run."""
    found = []
    for kind in (runs, pretraining):
        monkeypatch.setattr(kind, "run", lambda config: found.append(config) or RECORD)
    return found


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("7", 7),
        ("-1", -1),
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("tiny-2x64", "tiny-2x64"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_is_what_it_looks_like(word, value):
    (found,) = __main__.parameters([f"name={word}"]).values()
    assert found == value and type(found) is type(value)


def test_what_comes_later_holds_and_a_chapters_own_question_is_left_out(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text("task: mini-sst2\nepochs: 3\ndownstream: null\n")
    found = __main__.parameters(["task=mini-mnli", str(path), "epochs=2"])
    assert found == {"task": "mini-sst2", "epochs": 2}
    assert __main__.parameters(["downstream=mini-sst2"]) == {"downstream": "mini-sst2"}  # which `configure` refuses


def test_text_is_told_from_a_task_by_what_is_given(computed, capsys):
    for words in (["corpus=mini-corpus"], ["steps=5"], ["method=tinybert"]):
        assert __main__.main(["run", *words]) == 0
    for words in ([], ["method=lgtm", "epochs=1"]):
        assert __main__.main(["run", *words]) == 0
    kinds = [type(config).__name__ for config in computed]
    assert kinds == ["PretrainingConfig"] * 3 + ["RunConfig"] * 2
    assert computed[1] == pretraining.configure(steps=5)
    assert computed[4] == runs.configure(method="lgtm", epochs=1)
    shown = capsys.readouterr()
    assert shown.out.count("validation/accuracy          0.8750\n") == 5 and not shown.err


def test_every_parameter_file_of_the_book_is_understood(root, computed):
    files = sorted((root / "configs").glob("*.yml"))
    for path in files:
        assert __main__.main(["run", str(path), "seed=7"]) == 0, path
    assert [config.seed for config in computed] == [7] * len(files) and files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metod=kd"], "unknown parameter 'metod'; did you mean 'method'"),
        (["method=kd", "epochs=0", "alpha=2"], "epochs is 0"),
        (["steps=5", "epochs=1"], "unknown parameter 'epochs'"),
        (["lgtm"], "'lgtm' is neither name=value nor a file that ends in .yml"),
        (["not_there.yml"], "cannot read not_there.yml"),
    ],
)
def test_wrong_parameters_are_one_message_and_status_2(computed, capsys, words, message):
    assert __main__.main(["run", *words]) == 2
    assert message in capsys.readouterr().err and computed == []


@pytest.mark.parametrize("text", ["- a\n- list\n", "just words\n", "1: 2\n", "a: [\n"])
def test_a_file_without_parameters_is_named(tmp_path, capsys, text):
    path = tmp_path / "odd.yml"
    path.write_text(text)
    assert __main__.main(["run", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingInterruptedError("interrupted after step 3"), 130),
        (checkpoints.CheckpointError("cannot write there"), 1),
        (ValueError("the student has 3 heads"), 1),
        (NonFiniteLossError("student", float("nan"), 1.0, [3]), 1),
        (processes.ProcessLostError("another process of this run is gone"), 1),
    ],
)
def test_what_a_run_raises_is_one_message_and_its_status(monkeypatch, capsys, error, status):
    def fail(config):
        raise error

    monkeypatch.setattr(runs, "run", fail)
    assert __main__.main(["run"]) == status
    shown = capsys.readouterr()
    assert shown.err == f"{error}\n" and not shown.out


def test_what_all_processes_say_is_said_once_and_that_one_is_gone_by_each(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert __main__.main(["run", "metod=kd"]) == 2
    assert not capsys.readouterr().err

    def fail(config):
        raise processes.ProcessLostError("gone")

    monkeypatch.setattr(runs, "run", fail)
    assert __main__.main(["run"]) == 1
    assert capsys.readouterr().err == "gone\n"


@pytest.mark.parametrize("method", [*METHODS, *ON_TEXT])
def test_every_parameter_of_every_method_is_described(method, capsys):
    assert __main__.main(["describe", method]) == 0
    shown = capsys.readouterr().out
    kind, shared = (
        {**METHODS, **ON_TEXT}[method],
        runs.RunConfig if method in METHODS else pretraining.PretrainingConfig,
    )
    ignored = {"settings", *getattr(kind, "ignores", ())}
    lines = shown.splitlines()
    for field in (*dataclasses.fields(kind), *dataclasses.fields(shared)):
        at = [number for number, line in enumerate(lines) if line.startswith(f"  {field.name} (")]
        assert len(at) == (field.name not in ignored), field.name
        if at:
            assert lines[at[0]].endswith(f" = {field.default}") and lines[at[0] + 1].startswith("      "), field.name


def test_methods_are_listed_and_a_wrong_name_is_named(capsys):
    assert __main__.main(["describe"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*METHODS, *ON_TEXT]
    assert __main__.main(["describe", "lgmt"]) == 2
    assert "there is no method 'lgmt'; expected one of fine_tune" in capsys.readouterr().err


def test_results_are_a_table(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    records.write_record(dataclasses.replace(RECORD, folder=tmp_path / "one"))
    assert __main__.main(["results", str(tmp_path)]) == 0
    assert "validation/accuracy 0.875" in capsys.readouterr().out
    on_text = dataclasses.replace(
        RECORD, run_id="text", config={"method": "tutor", "corpus": "c"}, metrics={"loss": 2.0}
    )
    (tmp_path / "two").mkdir()
    records.write_record(dataclasses.replace(on_text, folder=tmp_path / "two"))
    assert __main__.main(["results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out and "None" not in out and out.count("\n\n") == 1 and "text\nmethod metric mean n" in out
    (tmp_path / "empty").mkdir()
    assert __main__.main(["results", str(tmp_path / "empty")]) == 0
    assert f"there are no records in {tmp_path / 'empty'}" in capsys.readouterr().out
    assert __main__.main(["results", str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    (tmp_path / "one").mkdir()
    records.write_record(dataclasses.replace(RECORD, folder=tmp_path / "one"))
    return tmp_path / "one"


def test_a_report_is_a_column_a_network(finished, monkeypatch, capsys):
    asked = []
    times = (report.Latency(1, 9, 0.0012345, 1e-4),)
    student = report.Network("student", 2_000_000, 500_000, 10 * 2**20, 3.0, {"accuracy": 0.875}, times)
    found = report.Report("a-run", (student,), "a processor, 2 threads")
    monkeypatch.setattr(report, "report", lambda record, measure: asked.append((record.run_id, measure)) or found)
    assert __main__.main(["report", str(finished)]) == 0
    rows = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert rows["million parameters"] == "2" and rows["ms, batch 1"] == "1.234" and rows["accuracy"] == "0.875"
    assert rows["latency: median and interquartile range, a sentence, on a processor, 2"] == "threads"
    assert __main__.main(["report", str(finished), "--recorded"]) == 0
    assert asked == [("a-run", True), ("a-run", False)]


def test_an_export_writes_what_is_asked_for(finished, monkeypatch, capsys):
    student = finished / "student"
    monkeypatch.setattr(exports, "to_onnx", lambda folder: folder / "onnx")
    monkeypatch.setattr(exports, "to_int8", lambda folder: folder / "int8")
    monkeypatch.setattr(cards, "write", lambda record, licence: record.folder / f"card-{licence}")
    assert __main__.main(["export", str(finished), "--onnx", "--int8"]) == 0
    assert capsys.readouterr().out == f"{student / 'onnx'}\n{student / 'int8'}\n"
    assert __main__.main(["export", str(finished), "--card", "--licence", "mit"]) == 0
    assert capsys.readouterr().out == f"{finished / 'card-mit'}\n"
    assert __main__.main(["export", str(finished)]) == 1
    assert capsys.readouterr().err == "say what to write: --onnx, --int8, --card\n"

    def fail(folder):
        raise ModuleNotFoundError("an export needs the package onnxscript")

    monkeypatch.setattr(exports, "to_onnx", fail)
    assert __main__.main(["export", str(finished), "--onnx"]) == 1
    assert capsys.readouterr().err == "an export needs the package onnxscript\n"


def test_a_submission_says_what_it_lacks(finished, monkeypatch, tmp_path, capsys):
    done = submission.Submission(tmp_path / "a.zip", {"RTE.tsv": "a-run"}, {"AX.tsv": "no run on this task was given"})
    asked = []
    monkeypatch.setattr(submission, "write", lambda runs, path: asked.append((runs[0].run_id, path)) or done)
    assert __main__.main(["submission", str(finished), "--zip", str(done.path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == f"RTE.tsv     a-run\n{done.path}\n"
    assert shown.err == "missing: AX.tsv (no run on this task was given)\n" and asked == [("a-run", done.path)]
    monkeypatch.setattr(submission, "write", lambda *_: dataclasses.replace(done, missing={}))
    assert __main__.main(["submission", str(finished)]) == 0


@pytest.mark.parametrize("command", ["report", "export", "submission"])
def test_a_folder_that_is_no_run_is_named(command, tmp_path, capsys):
    words = [command, str(tmp_path), *(["--card"] if command == "export" else [])]
    assert __main__.main(words) == 1
    assert f"{tmp_path} holds no record.json: give the folder of a finished run" in capsys.readouterr().err
    assert __main__.main([*words[:1], str(tmp_path / "gone"), *words[2:]]) == 1
    assert "gone" in capsys.readouterr().err


def test_the_doctor_gets_what_is_meant_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "main", lambda arguments: asked.append(arguments) or 1)
    assert __main__.main(["doctor", "--glue", "here", "--hub"]) == 1
    assert asked == [["--glue", "here", "--hub"]]


def test_it_is_a_command(root):
    done = subprocess.run([sys.executable, "-m", "kdlib", "run", "--odd"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: --odd" in done.stderr


def test_a_record_alone_is_not_a_run(finished, tmp_path, capsys):
    alone = tmp_path / "a-run.json"
    alone.write_text((finished / "record.json").read_text())
    assert __main__.main(["report", str(alone)]) == 1
    assert "needs the networks of its run: give the run's own folder" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("study.yml", "holds no record.json"), ("nowhere", "there is no folder")])
def test_nobody_is_told_to_delete_a_file_that_is_no_record(name, said, tmp_path, capsys):
    (tmp_path / "study.yml").write_text("question: why?\n")
    assert __main__.main(["report", str(tmp_path / name)]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "delete it" not in shown
