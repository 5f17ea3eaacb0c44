"""Chapter 11 as its users run it: papermill with parameters, on the embedded text and on a file of one's own."""

import dataclasses

import pytest
import yaml

from kdlib import engine, miniglue, models, pretraining, runs
from tests.forms import offered, perform

CHAPTER = "chapters/11_pretraining.py"
EXTRA = {"downstream": "mini-sst2"}  # what the form offers beside the fields of the configuration


def test_the_form_offers_every_parameter_of_all_runs_with_its_default(root):
    """The parameters cell and the settings classes are two lists of the same things; this keeps them one."""
    fields = dataclasses.fields(pretraining.PretrainingConfig)
    shared = {field.name: field.default for field in fields if field.name != "settings"}
    form = offered(root / CHAPTER)
    assert form.items() >= {**shared, **EXTRA}.items()
    own = {name: value for name, value in form.items() if name not in {**shared, **EXTRA}}
    assert own == dict.fromkeys(own) and own.keys() <= pretraining.READ_BY.keys()


def test_a_misspelt_parameter_stops_before_any_work(root, tmp_path):
    with pytest.raises(ValueError, match=r"unknown parameter 'stpes'; did you mean 'steps'"):
        perform(root / CHAPTER, tmp_path, stpes=2)
    assert not (tmp_path / "runs").exists()


def test_the_papers_parameter_file_is_valid_and_says_what_the_paper_says(root):
    parameters = yaml.safe_load((root / "configs" / "tutor_kd_pretraining.yml").read_text())
    assert parameters.pop("downstream") is None
    config = pretraining.configure(**parameters)
    assert (config.teacher, config.student, config.method) == ("bert-base-uncased", "tutor-66m", "tutor")
    assert (config.batch_size, config.learning_rate, config.steps) == (128, 5e-4, 1_000_000)
    assert (config.warmup_ratio, config.weight_decay, config.max_length) == (0.1, 0.01, 128)
    assert (config.settings.logit_weight, config.settings.inner_weight) == (25, 0.5)
    assert config.precision == "bf16" and config.checkpoint_every <= config.evaluate_every < config.steps
    assert "+" in config.corpus


def test_a_text_and_a_teacher_of_ones_own_by_another_method(root, tmp_path):
    """Three steps on a file, with a teacher in a folder, then the student goes on to a task as chapter 12 would."""
    lines = (miniglue.folder() / "mini-corpus" / "train.txt").read_text().splitlines()[:60]
    (tmp_path / "own.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = miniglue.tokenizer()
    engine.save_pretrained(models.load_masked("tiny-2x32", tokenizer), tokenizer, tmp_path / "teacher")
    text = perform(
        root / CHAPTER,
        tmp_path,
        corpus="own.txt",
        teacher="teacher",
        student="tiny-1x32",
        method="minilm_v2",
        steps=3,
        batch_size=8,
        downstream=None,
    )
    assert "lines: 60" in text and "held out: 3" in text and "no task was asked for" in text
    assert "128 runs of 880 epochs" in text
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("record.json"))
    settings = {"task": "mini-sst2", "method": "fine_tune", "student": str(folder / "student"), "max_steps": 1}
    settings |= {"max_train": 96, "max_evaluation": 8, "predict_test": False, "device": "cpu"}
    assert runs.run(runs.configure(**settings, output_dir=str(tmp_path / "tuned"))).best_step == 1
