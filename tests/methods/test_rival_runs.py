"""The rivals as whole runs: on every kind of task, interrupted, and what they leave."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from kdlib import checkpoints, configuration, engine, models, runs, trainer
from kdlib.methods import METHODS
from kdlib.methods.pesf import adapt
from kdlib.settings import ConfigurationError

SMALL = {
    "task": "mini-mnli",
    "teacher": "tiny-2x64",
    "student": "tiny-2x32",
    "max_train": 96,
    "max_evaluation": 50,
    "teacher_epochs": 3,
    "epochs": 3,  # 9 steps each
    "checkpoint_every": 2,
    "device": "cpu",
}
RIVALS = {
    "pkd": {"student": "tiny-2x64"},
    "dist": {},
    "skd": {},
    "takd": {},
    "rco": {"anchors": 3},
    "annealing": {"max_temperature": 2, "first_stage": 0.4},
    "theseus": {"student": "tiny-1x64", "replacing_rate": 0.5},
    "tinybert_task": {"first_stage": 0.4},
    "pesf": {"adapter_size": 8},
}
pytestmark = pytest.mark.usefixtures("few_to_test")


class StoppedError(Exception):
    """Somebody pulled the plug."""


def configured(method: str, folder, **more) -> configuration.RunConfig:
    return runs.configure(**{**SMALL, "method": method, **RIVALS[method], **more}, output_dir=str(folder))


def pull_the_plug(monkeypatch, step: int) -> None:
    """After so many steps of a training, before what is due then."""
    original = trainer._due

    def due(taken: int, *rest) -> bool:
        if taken == step:
            raise StoppedError
        return original(taken, *rest)

    monkeypatch.setattr(trainer, "_due", due)


def left(config: configuration.RunConfig) -> dict:
    record = runs.read_record(config.folder)
    names = sorted(path.name for path in config.folder.iterdir())
    weights = {path.name: load_file(path) for path in sorted(config.folder.rglob("*.safetensors"))}
    return {"history": record.history, "metrics": record.metrics, "names": names, "weights": weights}


def equal(first: dict, second: dict) -> None:
    weights = first.pop("weights"), second.pop("weights")
    assert first == second
    for name, tensors in weights[0].items():
        assert all(torch.equal(value, weights[1][name][key]) for key, value in tensors.items()), name


@pytest.mark.parametrize("method", RIVALS)
def test_interrupted_in_the_second_stage_it_ends_the_same(method, tmp_path, monkeypatch):
    """Catches a stage, an anchor or draws that begin anew."""
    whole, broken = (configured(method, tmp_path / name) for name in ("whole", "broken"))
    runs.run(whole)
    runs.teacher_of(broken)
    with monkeypatch.context() as patch:
        pull_the_plug(patch, 7)
        with pytest.raises(StoppedError):
            runs.run(broken)
    assert checkpoints.read_tensors(broken.folder / trainer.CHECKPOINT)[1]["training"]["step"] == 6
    runs.run(broken)
    equal(left(whole), left(broken))


def test_a_teacher_interrupted_just_after_an_anchor_keeps_the_same_ones(tmp_path, monkeypatch):
    whole, broken = (configuration.teachers_config(configured("rco", tmp_path / name)) for name in ("one", "two"))
    runs.run(whole)
    with monkeypatch.context() as patch:
        pull_the_plug(patch, 3)
        with pytest.raises(StoppedError):
            runs.run(broken)
    anchors = [f"{trainer.ANCHOR}{number}.safetensors" for number in range(2)]
    assert [(broken.folder / name).exists() for name in anchors] == [True, False]
    runs.run(broken)
    ends = left(whole), left(broken)
    assert set(anchors) <= {*ends[0]["names"]}
    assert not torch.equal(*(ends[0]["weights"][name]["classifier.weight"] for name in anchors))
    equal(*ends)


def test_an_anchor_is_the_network_as_it_was_after_that_step(tmp_path):
    """Six of nine steps are two thirds of the way: a run that is stopped there leaves the same weights."""
    config = configuration.teachers_config(configured("rco", tmp_path))
    runs.run(config)
    network = models.load(str(config.folder / engine.STUDENT), config.glue_task, models.load_tokenizer("tiny-2x64"))
    found = [*trainer.anchors(config.folder, 2, network)]
    stopped = dataclasses.replace(config, max_seconds=1e-9, output_dir=str(tmp_path / "stopped"))
    for _ in range(6):
        with pytest.raises(trainer.TrainingInterruptedError):
            runs.run(stopped)
    weights, state = checkpoints.read_tensors(stopped.folder / trainer.CHECKPOINT)
    assert state["training"]["step"] == 6
    for name, value in found[1].state_dict().items():
        assert any(torch.equal(value, other) for key, other in weights.items() if key.endswith(name)), name


def test_a_way_that_is_shorter_than_its_anchors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a training of 9 steps cannot keep 9 networks on its way"):
        runs.run(configured("rco", tmp_path, anchors=10, epochs=4))


def test_a_student_that_would_not_see_all_of_it_is_refused_before_the_teacher_is_made(tmp_path):
    """Too few steps for the anchors, or for one of two stages."""
    for method, more, said in (
        ("rco", {"anchors": 4, "max_steps": 3}, "anchors is 4, but the student takes 3 steps"),
        ("annealing", {"max_steps": 1}, "the student takes 1 steps: one of the two stages has none"),
        ("tinybert_task", {"first_stage": 0.01}, "first_stage is 0.01, and the student takes 9 steps"),
    ):
        with pytest.raises(ValueError, match=said):
            runs.run(configured(method, tmp_path, **more))
    assert not [*tmp_path.glob("*/record.json")]
    for share in (0.0, 1.0):
        with pytest.raises(ConfigurationError, match=f"first_stage is {share}; expected a number above 0 and below 1"):
            configured("tinybert_task", tmp_path, first_stage=share)


@pytest.mark.parametrize("method", ["annealing", "tinybert_task"])
def test_the_student_is_chosen_in_the_second_stage(method, tmp_path, monkeypatch):
    """Also where one of the first has the higher score, or the same."""
    monkeypatch.setattr(
        trainer, "evaluation", lambda student, *_, **__: lambda: {"validation/accuracy": score(student)}
    )

    def score(student) -> float:
        return 1.0 if student.taken <= 4 else 0.5

    record = runs.run(configured(method, tmp_path, first_stage=0.5, evaluate_every=2))
    assert [row["step"] for row in record.history] == [2, 4, 6, 8, 9] and record.best_step == 6


def test_an_anchor_that_is_gone_is_made_again(tmp_path):
    config = configured("rco", tmp_path)
    first = left(dataclasses.replace(config)) if runs.run(config) else {}
    own = configuration.teachers_config(config)
    (own.folder / f"{trainer.ANCHOR}1.safetensors").unlink()
    engine.forget(config.folder)
    runs.run(config)
    assert (own.folder / f"{trainer.ANCHOR}1.safetensors").exists()
    equal(first, left(config))
    engine.forget(own.folder)
    assert not [*own.folder.glob("anchor-*")]


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("task", ["mini-sst2", "mini-stsb"])
def test_every_rival_runs_on_classes_and_scores_or_says_why_not(method, task, tmp_path):
    small = {"task": task, "epochs": 1, "teacher_epochs": 1}
    if method == "skd" or (task == "mini-stsb" and method in ("dist", "pesf")):
        reason = (
            "has two classes" if task == "mini-sst2" else "is a regression task.*(take method kd|expected logit_mse)"
        )
        with pytest.raises(ConfigurationError, match=reason):
            configured(method, tmp_path, **small, **({"objective": "kl"} if method == "pesf" else {}))
        return
    record = runs.run(configured(method, tmp_path, **small))
    assert all(value == value for value in record.metrics.values())
    student = AutoModelForSequenceClassification.from_pretrained(record.folder / engine.STUDENT)
    assert (
        student.state_dict().keys()
        == models.load(record.config["student"], record_task(record), models.load_tokenizer("tiny-2x64"))
        .state_dict()
        .keys()
    )


def record_task(record):
    return runs.configure(**record.config).glue_task


def test_an_adapter_is_left_that_makes_the_teacher_what_it_was(tmp_path):
    """On top of the run that made the teacher; the folder of a whole network would not load."""
    config = configured("pesf", tmp_path)
    record = runs.run(config)
    own = configuration.teachers_config(config)
    network = models.load(str(own.folder / engine.STUDENT), config.glue_task, models.load_tokenizer("tiny-2x64"))
    adapt(network, 8)
    learned, _ = checkpoints.read_tensors(record.folder / engine.ADAPTER)
    assert learned.keys() == models.trainable(network).keys()
    network.load_state_dict(learned, strict=False)
    split = runs.encode_all(runs.load_data(config), models.load_tokenizer("tiny-2x64"), config.max_length)["validation"]
    loss = trainer.evaluation(dataclasses.replace(trainer_learner(network)), config.glue_task, {"validation": split})()[
        "validation/loss"
    ]
    assert loss == pytest.approx(record.history[-1]["teacher/validation/loss"], rel=1e-6)
    assert not (record.folder / engine.TEACHER_FOLDER).exists()


def trainer_learner(network):
    from kdlib.learner import accelerator_for, learner

    return learner("teacher", network, accelerator_for("cpu"), 1e-3, 1)


class TestAssistants:
    def test_a_chain_of_any_length(self, tmp_path):
        config = configured("takd", tmp_path, assistants="tiny-2x64h4, tiny-1x64")
        last = configuration.teachers_config(config)
        first = configuration.teachers_config(last)
        teacher = configuration.teachers_config(first)
        assert [one.method for one in (config, last, first, teacher)] == ["takd", "takd", "kd", "fine_tune"]
        assert [one.student for one in (config, last, first, teacher)] == [
            "tiny-2x32",
            "tiny-1x64",
            "tiny-2x64h4",
            "tiny-2x64",
        ]
        assert configuration.teachers_config(teacher) is None
        record = runs.run(config)
        assert record.teacher == last.run_id and {path.name for path in tmp_path.iterdir()} == {
            one.run_id for one in (config, last, first, teacher)
        }

    def test_the_assistant_is_distilled_as_the_student_is_and_shared_by_its_seeds(self, tmp_path):
        config = configured("takd", tmp_path, alpha=0.2, temperature=3.0, epochs=5, seed=4)
        assistant = configuration.teachers_config(config)
        assert (assistant.settings.alpha, assistant.settings.temperature, assistant.epochs) == (0.2, 3.0, 5)
        assert (assistant.student, assistant.seed, assistant.predict_test) == ("tiny-2x48h3", 0, False)
        assert assistant == configuration.teachers_config(dataclasses.replace(config, seed=9))
        fixed = configuration.teachers_config(configured("skd", tmp_path))
        assert configuration.teachers_config(assistant).run_id == fixed.run_id

    @pytest.mark.parametrize(
        ("assistants", "said"),
        [
            ("0", "assistants is '0'; expected numbers of layers from 1 on"),
            ("tiny-2x33", "'tiny-2x33': a tiny BERT needs"),
        ],
    )
    def test_wrong_ones_are_named(self, assistants, said, tmp_path):
        with pytest.raises(ConfigurationError, match=said):
            configured("takd", tmp_path, assistants=assistants)
        with pytest.raises(ConfigurationError, match="'tiny-2x33': a tiny BERT needs"):
            configured("takd", tmp_path, teacher="tiny-2x33")

    def test_one_in_a_folder_counts_by_what_is_in_it(self, tmp_path):
        """Other weights under the same path are another run, the same under another path are not."""
        tokenizer = models.load_tokenizer("tiny-2x64")
        task = configured("pkd", tmp_path).glue_task
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            network = models.load("tiny-2x64", task, tokenizer, seed)
            network.save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
        ids = [configured("takd", tmp_path, assistants=f"{tmp_path / name}, 1").run_id for name in "abc"]
        assert ids[0] == ids[1] != ids[2]

    def test_a_number_is_so_many_of_the_teachers_layers(self, tmp_path):
        networks = {"teacher": "bert-base-uncased", "student": None, "student_layers": 6}
        with pytest.raises(ConfigurationError, match="assistants is missing: name the networks between"):
            configured("takd", tmp_path, **networks)
        assistant = configuration.teachers_config(configured("takd", tmp_path, **networks, assistants="10"))
        assert (assistant.teacher, assistant.student, assistant.student_layers) == ("bert-base-uncased", None, 10)

    def test_a_teacher_that_is_there_still_has_assistants(self, tmp_path):
        networks = {"teacher": "book-teacher", "student": "tiny-2x32", "teacher_epochs": None}
        config = configured("takd", tmp_path, **networks, assistants="tiny-2x64")
        assistant = configuration.teachers_config(config)
        assert (assistant.method, assistant.teacher) == ("kd", "book-teacher")
        assert configuration.teachers_config(assistant) is None


def test_a_pair_that_does_not_fit_is_refused_before_the_teacher_is_fine_tuned(tmp_path):
    for method, student in (("pkd", "tiny-2x32"), ("theseus", "tiny-1x32"), ("tinybert_task", "tiny-4x32")):
        with pytest.raises(ValueError, match=r"choose a student|take a student|needs at least one layer"):
            runs.run(configured(method, tmp_path, student=student))
    assert not [path for folder in tmp_path.iterdir() for path in folder.iterdir() if "record" in path.name]


def test_all_rivals_are_methods():
    assert {*RIVALS} == {*METHODS} - {"fine_tune", "kd", "prokt", "dml", "metadistil", "ikd", "lgtm"}
