"""GLUE submissions: the names, rows and words that the server expects, and what is said of what is missing."""

import dataclasses
import zipfile

import pandas as pd
import pytest

from kdlib import engine, glue, models, records, runs, sources, submission
from tests.test_main import RECORD

NAMES = {
    "cola": ["CoLA.tsv"], "sst2": ["SST-2.tsv"], "mrpc": ["MRPC.tsv"], "stsb": ["STS-B.tsv"], "qqp": ["QQP.tsv"],
    "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv"], "qnli": ["QNLI.tsv"], "rte": ["RTE.tsv"], "wnli": ["WNLI.tsv"],
}  # fmt: skip
"""As https://gluebenchmark.com/faq lists them; the diagnostics, AX.tsv, come from MNLI's run."""


@pytest.fixture
def finished(tmp_path):
    """A function that makes a finished run on a task, with predictions of so many rows."""

    def make(task, rows=None, name=None):
        folder = tmp_path / (name or task)
        folder.mkdir()
        for file in NAMES.get(task, [f"{task}.tsv"]):
            lines = [f"{row}\t0" for row in range(rows or submission.ROWS.get(file, 5))]
            (folder / file).write_text("\n".join(["index\tprediction", *lines]) + "\n")
        config = {
            "task": task,
            "source": str(tmp_path / "elsewhere"),
            "method": "fine_tune",
            "student": "minilm",
            "teacher": None,
        }
        return dataclasses.replace(RECORD, run_id=name or task, config=config, folder=folder)

    return make


@pytest.fixture
def answered(monkeypatch):
    """AX without a network."""

    def answer(record):
        path = record.folder / "AX.tsv"
        lines = [f"{row}\tneutral" for row in range(submission.ROWS["AX.tsv"])]
        path.write_text("\n".join(["index\tprediction", *lines]) + "\n")
        return path

    monkeypatch.setattr(submission, "diagnostics", answer)


def test_all_tasks_make_the_eleven_files(finished, answered, tmp_path):
    done = submission.write([finished(task) for task in NAMES], tmp_path / "all.zip")
    with zipfile.ZipFile(done.path) as archive:
        assert sorted(archive.namelist()) == sorted([*(n for names in NAMES.values() for n in names), "AX.tsv"])
        for name in archive.namelist():
            with archive.open(name) as file:
                table = pd.read_csv(file, sep="\t")
            assert list(table) == ["index", "prediction"] and list(table["index"]) == list(range(submission.ROWS[name]))
    assert done.missing == {} and done.answered["AX.tsv"] == done.answered["MNLI-mm.tsv"] == "mnli"
    again = submission.write([records.RunRecord(**vars(finished("rte", name="other")))], tmp_path / "one.zip")
    assert again.answered == {"RTE.tsv": "other"} and set(again.missing) == set(submission.ROWS) - {"RTE.tsv"}


def test_what_cannot_be_submitted_is_said(finished, tmp_path):
    rte, path = finished("rte"), tmp_path / "no.zip"
    with pytest.raises(ValueError, match=r"rte and another both answer RTE\.tsv: give one of them"):
        submission.write([rte, finished("rte", name="another")], path)
    with pytest.raises(ValueError, match="mini-sst2 has no predictions that the GLUE server takes"):
        submission.write([finished("mini-sst2")], path)
    with pytest.raises(ValueError, match=r"RTE\.tsv of short has 2999 rows, GLUE's test split has 3000"):
        submission.write([finished("rte", rows=2999, name="short")], path)
    assert not path.exists()
    done = submission.write([finished("mnli")], path)
    assert "elsewhere" in done.missing["AX.tsv"] and done.missing["QQP.tsv"] == "no run on this task was given"


@pytest.fixture(scope="module")
def mnli(tmp_path_factory):
    """A run on a folder in GLUE's layout that holds MiniGLUE's pairs, MNLI's splits and the diagnostics."""
    folder = tmp_path_factory.mktemp("glue")
    data = glue.load("miniglue", "mini-mnli", max_train=64)
    rows = data.train.to_pandas()[["premise", "hypothesis", "label"]]
    (folder / "mnli").mkdir()
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows.to_parquet(folder / "mnli" / f"{split}.parquet")
    for split in ("test_matched", "test_mismatched"):
        rows.assign(label=-1).to_parquet(folder / "mnli" / f"{split}.parquet")
    (folder / "ax").mkdir()
    rows[:30].assign(label=-1).to_parquet(folder / "ax" / "test.parquet")
    tokenizer = models.load_tokenizer("book-teacher")
    engine.save_pretrained(models.load("book-teacher", data.task, tokenizer), tokenizer, folder / "network")
    config = {"source": str(folder), "task": "mnli", "method": "fine_tune", "student": str(folder / "network")}
    quick = {"learning_rate": 1e-6, "max_steps": 1, "device": "cpu"}
    return runs.run(runs.configure(**config, **quick, output_dir=str(folder / "runs")))


def test_the_diagnostics_are_answered_by_the_student_of_mnli(mnli, tmp_path, monkeypatch):
    table = pd.read_csv(submission.diagnostics(mnli), sep="\t")
    matched = pd.read_csv(mnli.folder / "MNLI-m.tsv", sep="\t")
    assert list(table["prediction"]) == list(matched["prediction"][:30])  # the same pairs
    assert set(table["prediction"]) <= {"entailment", "neutral", "contradiction"} and table["prediction"].nunique() > 1
    monkeypatch.setattr(submission, "ROWS", {"MNLI-m.tsv": 64, "MNLI-mm.tsv": 64, "AX.tsv": 30})
    done = submission.write([mnli], tmp_path / "mnli.zip")
    assert done.missing == {} and set(done.answered) == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}
    assert submission.write([mnli], tmp_path / "mnli.zip") == done  # AX.tsv is there already


def test_a_split_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(sources, "find", lambda *_: sources.Source({"train": lambda: pytest.fail("read")}))
    with pytest.raises(ValueError, match="here has no split 'test' for task 'ax', it has train"):
        glue.load_test("here", glue.DIAGNOSTICS)


def test_the_server_counts_the_rows_of_the_real_test_splits(shared):
    for task in ("rte", "cola", "mrpc", "sst2", "stsb"):
        assert len(glue.load_test(shared / "glue", glue.TASKS[task])) == submission.ROWS[NAMES[task][0]], task


def test_a_run_on_real_data_can_be_submitted(shared, tmp_path):
    config = {"source": str(shared / "glue"), "task": "rte", "method": "fine_tune", "teacher": "minilm"}
    quick = {"student_layers": 1, "max_length": 12, "max_train": 8, "max_evaluation": 8, "max_steps": 1}
    made = runs.run(runs.configure(**config, **quick, device="cpu", output_dir=str(tmp_path)))
    done = submission.write([made], tmp_path / "rte.zip")
    with zipfile.ZipFile(done.path) as archive, archive.open("RTE.tsv") as file:
        table = pd.read_csv(file, sep="\t")
    assert len(table) == 3000 and set(table["prediction"]) <= {"entailment", "not_entailment"}
