"""The papers' parameter files: what they say the defaults are is so, and their rivals run from them."""

import pytest
import yaml

from kdlib import configuration, pretraining, runs
from tools.chapters import ROOT

FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.yml"))
PRETRAINING = "tutor_kd_pretraining"


def configured(name: str, **changes):
    """What papermill -f configs/NAME.yml -p ... configures."""
    given = yaml.safe_load((ROOT / "configs" / f"{name}.yml").read_text())
    given.pop("downstream", None)
    return (pretraining if name == PRETRAINING else runs).configure(**{**given, **changes})


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_configuration(name):
    assert configured(name).method in name.replace("tutor_kd_pretraining", "tutor").replace("tutor_kd", "fine_tune")


@pytest.mark.parametrize("method", ["kd", "metadistil", "ikd"])
def test_the_two_stage_rivals_of_lgtm_fine_tune_their_teacher(method):
    """A head that was never trained has nothing to teach."""
    config = configured("lgtm", method=method)
    assert config.settings.teacher_epochs == 6 and configuration.teachers_config(config).learning_rate == 3e-5


def test_lgtm_is_as_the_paper_sets_it():
    settings = configured("lgtm").settings
    assert (settings.teacher_epochs, settings.teaching_rate, settings.teacher_alpha) == (0, 3e-5, 0.6)
    term = settings.influence, settings.influence_weight, settings.objective
    assert term == ("weighted", 1.0, "soft_cross_entropy")
    released = {"alpha": 0.0, "objective": "kl", "influence": "released", "learning_rate": 5e-5}
    assert configured("lgtm", **released).settings.influence_weight == "teacher_rate"
    configured("lgtm", feedback_fraction=0.0, feedback_from="validation")
    for method in ("prokt", "dml"):
        assert configured("lgtm", method=method).settings.teacher_epochs == 0


def test_metadistils_and_ikds_rivals_too():
    for name in ("metadistil", "ikd"):
        assert configured(name, method="kd", teaching_rate=None).settings.teacher_epochs == 3
    assert configured("metadistil", task="stsb", objective="logit_mse").glue_task.is_regression


def test_ikd_is_as_the_paper_sets_it():
    config = configured("ikd")
    assert (config.settings.meta_weight, config.settings.feedback_at, config.settings.exam) == (0.5, "before", "course")
    table1 = configured("ikd", teacher="bert-large-uncased", student="bert-base-uncased", student_layers=4)
    assert (table1.student, table1.student_layers) == ("bert-base-uncased", 4)


def test_tutor_kds_rivals_too():
    config = configured(PRETRAINING)
    weights = (config.settings.logit_weight, config.settings.inner_weight, config.settings.reward_weight)
    assert (*weights, config.settings.order) == (25.0, 0.5, 0.5, "together")
    for method in ("soft_labels", "minilm", "minilm_v2"):
        assert configured(PRETRAINING, method=method).method == method
