"""Configurations, runs end to end on a few steps, records and tables."""

import dataclasses
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from kdlib import book, configuration, engine, folders, glue, machine, models, records, runs, trainer
from kdlib.batches import Encoded
from kdlib.runs import RunConfig
from kdlib.settings import ConfigurationError

QUICK = {
    "task": "mini-mnli",
    "teacher": "tiny-2x32",
    "student": "tiny-1x32",
    "max_train": 96,
    "max_evaluation": 64,
    "max_steps": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder):
    return runs.configure(**QUICK, output_dir=str(folder))


@pytest.fixture(scope="module")
def record(config):
    return runs.run(config)


def test_others_may_read_the_student(record, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    files = list((record.folder / engine.STUDENT).iterdir())
    assert {file.stat().st_mode for file in files} == {plain.stat().st_mode} and len(files) > 2


def test_a_run_that_another_process_computes_is_waited_for(record, config, tmp_path, monkeypatch):
    """The runs that share a teacher start side by side; one of them fine-tunes it."""
    monkeypatch.setattr(runs, "_compute", lambda config: pytest.fail("computed a second time"))
    other = dataclasses.replace(config, output_dir=str(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        with folders.alone_in(other.folder):
            waiting = pool.submit(runs.run, other)
            assert not wait([waiting], timeout=0.5).done
            shutil.copy(record.folder / records.RECORD, other.folder)
        assert waiting.result(30).metrics == record.metrics


class TestConfigure:
    def test_defaults_are_complete(self):
        config = runs.configure()
        assert (config.source, config.task, config.method) == ("miniglue", "mini-mnli", "kd")
        left = {name for name, value in dataclasses.asdict(config).items() if value is None}
        limits = {"max_train", "max_evaluation", "max_steps", "evaluate_every", "checkpoint_every"}
        later = {"metrics", "untrained_teacher", "max_grad_norm", "max_seconds"}
        assert left == limits | {"text_columns", "student_layers", *later, *runs.OF_METHODS}

    @pytest.mark.parametrize(
        ("networks", "teacher", "student"),
        [
            ({"teacher": "tiny-4x128", "student": "tiny-2x64"}, 1e-3, 2e-3),
            ({"teacher": "minilm", "student_layers": 3}, 1e-4, 2e-4),
            ({"teacher": "minilm", "student": "minilm"}, 1e-4, 2e-4),
            ({"teacher": "bert-base-uncased", "student_layers": 6}, 3e-5, 5e-5),
            ({"teacher": "bert-base-uncased", "student": "tiny-2x64"}, 3e-5, 2e-3),
        ],
    )
    def test_learning_rates_suit_the_networks(self, networks, teacher, student):
        config = runs.configure(**networks)
        assert (config.teacher_learning_rate, config.learning_rate) == (teacher, student)
        assert configuration.teachers_config(config).learning_rate == teacher
        given = runs.configure(**networks, teacher_learning_rate=7e-4, learning_rate=8e-4)
        assert (given.teacher_learning_rate, given.learning_rate) == (7e-4, 8e-4)

    def test_all_problems_in_one_message_with_the_nearest_names(self):
        with pytest.raises(ConfigurationError) as caught:
            runs.configure(
                temprature=2, task="mini-sst", method="distill", epochs="three", alpha=1.5, batch_size=0, seed=True
            )
        message = str(caught.value)
        assert message.count("\n  - ") == 7
        assert "unknown parameter 'temprature'; did you mean 'temperature'" in message
        assert "'mini-sst'" in message and "mini-sst2" in message
        assert "method is 'distill'; expected one of fine_tune, kd" in message
        assert "epochs is 'three' (str); expected int or None" in message
        assert "alpha is 1.5; expected a number between 0 and 1" in message
        assert "batch_size is 0; expected a positive number" in message
        assert "seed is True (bool); expected int" in message

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"task": "mini-stsb", "objective": "kl"}, "regression task, where a softmax has no meaning"),
            ({"teacher": "tiny4x128"}, "not of the form 'tiny-<layers>x<hidden>'"),
            ({"source": "glue", "task": "rte", "student": "minilm"}, "needs a pretrained teacher"),
            ({"source": "glue", "task": "rte", "teacher": "minilm"}, "needs a student"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"learning_rate": float("inf")}, "learning_rate is inf"),
            ({"teacher_epochs": -1}, "teacher_epochs is -1; expected 0 or more"),
            ({"precision": "fp61"}, "did you mean 'fp16'"),
            ({"task": "mine", "text_columns": "a,b,c"}, "expected one or two"),
            ({"task": "mine", "text_columns": "a,"}, "has a column without a name"),
            ({"task": "mine", "text_columns": ""}, "has a column without a name"),
            ({"task": "mine", "text_columns": "a", "metrics": "accuracy,"}, "metric ''"),
            ({"task": "mine", "text_columns": "a", "metrics": "makro_f1"}, "did you mean 'macro_f1'"),
            ({"label_column": "stars"}, "label_column is 'stars', which describes data of your own: give text_columns"),
            ({"regression": True}, "regression is True, which describes data of your own"),
            ({"metrics": "f1"}, "metrics is 'f1', which describes data of your own"),
            ({"pkd_layers": "last"}, "pkd_layers is 'last', but pkd_weight is 0, which leaves PKD out"),
            ({"method": "ikd", "feedback_batch_size": 4}, "feedback_batch_size is 4, but the exam is the course batch"),
            ({"method": "fine_tune", "teacher": "minilm", "student": "minilm"}, "trains the student 'minilm' alone"),
            ({"teacher_epochs": 0}, "the head of teacher 'tiny-2x64' was never trained, and kd would teach"),
            ({"teacher_epochs": 0, "method": "metadistil"}, "was never trained, and metadistil would teach"),
            ({"teacher": ""}, "teacher is ''; expected a name or a path"),
            ({"output_dir": " "}, "output_dir is ' '; expected a name or a path"),
            ({"source": "a\0b", "teacher": "minilm", "student": "minilm"}, "expected a name or a path"),
            ({"student": "\udcff"}, "expected a name or a path"),
            ({"seed": 2**32}, "seed is 4294967296; expected 4,294,967,295 at most"),
            ({"batch_size": 10**30}, "batch_size is 1000000000000000000000000000000; expected 1,000,000 at most"),
            ({"learning_rate": 1e300}, "expected 1,000.0 at most"),
            ({"temperature": 1e-320}, "temperature is 1e-320; expected at least 0.001"),
            ({"weight_decay": float("inf")}, "weight_decay is inf; expected 0 or more"),
        ],
    )
    def test_single_problems(self, parameters, message):
        with pytest.raises(ConfigurationError, match=message) as caught:
            runs.configure(**parameters)
        assert str(caught.value).count("\n  - ") == 1

    @pytest.mark.parametrize("name", ["../../evil", "/etc/x", "..", "a\nb", "", "x" * 200, "a/b"])
    def test_a_task_whose_name_is_no_file_name_is_refused(self, name):
        with pytest.raises(ConfigurationError, match=r"files are named\s+after it") as caught:
            runs.configure(task=name, text_columns="text")
        assert str(caught.value).count("\n  - ") == 1

    @pytest.mark.parametrize(
        "field", [f for f in dataclasses.fields(RunConfig) if "int" in str(f.type)], ids=lambda f: f.name
    )
    @pytest.mark.parametrize("value", [10**40, -(10**40)])
    def test_every_whole_number_has_a_limit(self, field, value):
        method = next(iter(configuration.READ_BY.get(field.name, ["kd"])))
        given = {"pkd_weight": 1.0} if field.name.startswith("pkd") else {}
        with pytest.raises(ConfigurationError, match=f"{field.name} is "):
            runs.configure(**{"method": method, **given, field.name: value})

    def test_an_integer_is_a_float_and_equal_configurations_share_an_identity(self):
        one, other = runs.configure(temperature=2), runs.configure(temperature=2.0, output_dir="x", resume=False)
        assert one.identity == other.identity and one.run_id == other.run_id
        assert one.run_id != runs.configure(temperature=3).run_id

    def test_what_fine_tuning_does_not_read_is_refused_and_can_be_left_out(self):
        given = {"alpha": 0.1, "temperature": 9, "teacher": "tiny-1x32", "teacher_seed": 4, "student": "tiny-2x32"}
        with pytest.raises(ConfigurationError) as caught:
            runs.configure(method="fine_tune", **given)
        assert all(name in str(caught.value) for name in given)
        left = runs.readable(given, "fine_tune")
        assert runs.configure(method="fine_tune", **left) == runs.configure(method="fine_tune", student="tiny-2x32")

    def test_regression_distils_logits(self):
        assert runs.configure(task="mini-stsb").objective == "logit_mse"

    def test_the_teacher_is_shared_by_runs_that_differ_in_the_student_only(self):
        one = configuration.teachers_config(runs.configure(seed=1, temperature=4, alpha=0.2))
        other = configuration.teachers_config(runs.configure(seed=2, student="tiny-1x64", learning_rate=1e-4))
        assert one.run_id == other.run_id and one.method == "fine_tune" and one.student == configuration.TEACHER
        assert configuration.teachers_config(runs.configure(teacher_seed=1)).run_id != one.run_id

    def test_no_teacher_to_fine_tune(self):
        for parameters in ({"method": "fine_tune"}, {"method": "prokt"}):
            with pytest.raises(ValueError, match="fine-tunes no teacher"):
                configuration.teachers_config(runs.configure(**parameters))


class TestRun:
    def test_the_record_is_complete_and_comes_back(self, record, config):
        assert record.config == dataclasses.asdict(config)
        assert set(record.metrics) == {"validation/accuracy", "test/accuracy"}
        assert record.history[-1]["step"] == 4 and record.best_step == 4
        assert record.samples == {"train": 96, "validation": 64, "test": 1000}
        assert record.environment["torch"] == torch.__version__
        assert runs.read_record(record.folder) == record
        assert len(record.history_frame) == len(record.history)

    def test_the_student_is_a_folder_for_from_pretrained_with_the_recorded_score(self, record, config):
        model = AutoModelForSequenceClassification.from_pretrained(record.folder / "student")
        tokenizer = AutoTokenizer.from_pretrained(record.folder / "student")
        data = runs.load_data(config)
        rows = data.evaluation["validation"]
        tokens = tokenizer(rows["premise"][:], rows["hypothesis"][:], padding=True, return_tensors="pt")
        with torch.no_grad():
            predicted = model(**tokens).logits.argmax(-1).numpy()
        accuracy = (predicted == np.array(rows["label"][:])).mean()
        assert accuracy == pytest.approx(record.metrics["validation/accuracy"])
        assert model.config.id2label[0] == "entailment"

    def test_predictions_in_glue_format(self, record):
        table = pd.read_csv(record.folder / "mini-mnli.tsv", sep="\t")
        assert list(table) == ["index", "prediction"] and len(table) == 1000
        assert set(table["prediction"]) <= {"entailment", "neutral", "contradiction"}

    def test_a_finished_run_leaves_no_checkpoint_and_is_not_run_again(self, record, config, monkeypatch):
        assert not list(record.folder.glob("*.safetensors"))
        monkeypatch.setattr(runs.trainer, "train", lambda *_, **__: pytest.fail("ran again"))
        assert runs.run(config) == record

    def test_resume_false_runs_again_with_the_same_result_and_so_does_the_teacher(self, record, config, monkeypatch):
        calls = []
        train = runs.trainer.train
        monkeypatch.setattr(runs.trainer, "train", lambda *a, **k: calls.append(1) or train(*a, **k))
        monkeypatch.setattr(runs, "notice", calls.append)
        again = runs.run(dataclasses.replace(config, resume=False))
        told = f"resume is False: {record.run_id} and {record.teacher} start afresh"
        assert calls == [told, 1, 1]
        assert again.metrics == record.metrics and again.history == record.history

    def test_the_teacher_is_a_run_with_a_cache_of_its_logits(self, record, folder):
        teacher = runs.read_record(folder / record.teacher)
        assert teacher.config["method"] == "fine_tune" and teacher.config["student"] == "tiny-2x32"
        assert len(list(teacher.folder.glob("logits-*.safetensors"))) == 1

    def test_a_teacher_fine_tuned_elsewhere_is_taken_as_it_is(self, record, folder):
        where = folder / record.teacher / "student"
        other = runs.run(
            runs.configure(**{**QUICK, "teacher": str(where)}, teacher_epochs=0, output_dir=str(folder / "elsewhere"))
        )
        assert other.teacher is None and len(list((folder / "elsewhere").iterdir())) == 1
        assert other.metrics == record.metrics  # the same teacher, the same student

    def test_a_cut_student(self, folder):
        config = runs.configure(**{**QUICK, "student": None}, student_layers=1, output_dir=str(folder))
        done = runs.run(config)
        model = AutoModelForSequenceClassification.from_pretrained(done.folder / "student")
        assert model.config.num_hidden_layers == 1
        deeper = runs.configure(**{**QUICK, "student": None}, student_layers=3, output_dir=str(folder))
        with pytest.raises(ValueError, match="the teacher has 2 layers"):
            runs.run(deeper)

    def test_a_test_split_may_be_missing_where_nobody_wants_predictions(self, tmp_path):
        for split in ("train", "validation"):
            rows = {"sentence1": ["a b", "c d"] * 4, "sentence2": ["a", "d"] * 4, "label": [0, 1] * 4}
            pd.DataFrame(rows).to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
        given = {"source": str(tmp_path), "task": "rte", "teacher": "minilm", "student_layers": 1}
        assert runs.load_data(runs.configure(**given, predict_test=False)).test == {}
        with pytest.raises(ValueError, match=r"has no split 'test' for task 'rte'.*predict_test=False"):
            runs.load_data(runs.configure(**given))

    def test_a_student_may_be_cut_from_a_checkpoint_of_its_own(self, folder, tmp_path):
        """IKD's Table 1: another network teaches than the one whose first layers are the student."""
        tokenizer = models.load_tokenizer("tiny-1x32")
        whole = models.load("tiny-3x32", glue.task_for("mini-mnli"), tokenizer, 7)
        engine.save_pretrained(whole.base_model, tokenizer, tmp_path / "own")
        config = runs.configure(**{**QUICK, "student": str(tmp_path / "own")}, student_layers=2)
        student = runs.load_student(config, config.glue_task, tokenizer)
        assert student.config.num_hidden_layers == 2
        for ours, theirs in zip(student.bert.encoder.layer, whole.bert.encoder.layer[:2], strict=True):
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("who", ["student", "teacher"])
    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_a_text_that_a_network_cannot_read_is_found_before_training(self, tmp_path, monkeypatch, who, split):
        for name in ("train", "validation", "test"):
            texts = ["the film was good", "the film was bad"] * 8
            texts[5] = "the film was good " * 40 if name == split else texts[5]
            pd.DataFrame({"text": texts, "label": [1, 0] * 8}).to_csv(tmp_path / f"{name}.csv", index=False)
        tokenizer = models.load_tokenizer("tiny-1x32")
        for name, longest in (("short", 64), ("long", 512)):
            configuration = models.tiny_config("tiny-1x32", len(tokenizer), 2)
            configuration.max_position_embeddings = longest
            engine.save_pretrained(BertForSequenceClassification(configuration), tokenizer, tmp_path / name)
        networks = {who: str(tmp_path / "short"), "teacher" if who == "student" else "student": str(tmp_path / "long")}
        monkeypatch.setattr(runs.trainer, "train", lambda *_, **__: pytest.fail("trained"))
        own = {"source": str(tmp_path), "task": "mine", "text_columns": "text", "untrained_teacher": True}
        config = runs.configure(
            **networks, **own, teacher_epochs=0, max_length=200, device="cpu", output_dir=str(tmp_path / "runs")
        )
        message = rf"reads 64 word pieces at most, but row 5 of {split} has \d+: give max_length 64"
        with pytest.raises(ValueError, match=message):
            runs.run(config)

    @pytest.mark.parametrize("method", ["kd", "metadistil", "ikd"])
    def test_a_head_that_was_never_trained_teaches_only_if_it_is_asked_for(self, tmp_path, method, monkeypatch):
        tokenizer = models.load_tokenizer("tiny-1x32")
        network = models.load("tiny-2x32", glue.task_for("mini-mnli"), tokenizer)
        engine.save_pretrained(network.base_model, tokenizer, tmp_path / "encoder")
        engine.save_pretrained(network, tokenizer, tmp_path / "classifier")
        given = {**QUICK, "method": method, "teacher_epochs": 0, "max_steps": 1, "output_dir": str(tmp_path / "runs")}
        with pytest.raises(
            ConfigurationError, match=rf"the head of teacher .*encoder' was never trained, and {method}"
        ):
            runs.run(runs.configure(**{**given, "teacher": str(tmp_path / "encoder")}))
        assert not list((tmp_path / "runs").glob("*/record.json"))
        asked = runs.configure(**{**given, "teacher": str(tmp_path / "encoder")}, untrained_teacher=True)
        assert runs.run(asked).config["untrained_teacher"] is True
        runs.run(runs.configure(**{**given, "teacher": str(tmp_path / "classifier")}))

    def test_the_time_that_a_run_may_take_is_kept(self, tmp_path):
        given = runs.readable({**QUICK, "max_steps": 6}, "fine_tune") | {"method": "fine_tune"}
        config = runs.configure(**given, output_dir=str(tmp_path), max_seconds=1e-3)
        with pytest.raises(
            trainer.TrainingInterruptedError, match=r"interrupted after step 1 of .*; run the same command"
        ):
            runs.run(config)
        again = runs.run(dataclasses.replace(config, max_seconds=None))
        plain = runs.run(dataclasses.replace(config, max_seconds=None, output_dir=str(tmp_path / "plain")))
        assert again.history == plain.history and again.run_id == plain.run_id

    def test_the_longest_gradient_is_that_of_the_configuration(self, config, monkeypatch):
        given: list[float] = []
        learner = runs.learner
        monkeypatch.setattr(runs, "learner", lambda *a, **k: given.append(a[7]) or learner(*a, **k))
        network = models.load("tiny-1x32", config.glue_task, models.load_tokenizer("tiny-1x32"))
        for norm in (None, 0.25):
            other = dataclasses.replace(config, max_grad_norm=norm)
            runs._learner("student", network, other, learner.accelerator_for("cpu"), 96)
        assert given == [1.0, 0.25]

    def test_the_student_alone_and_the_oracle(self, folder, record):
        given = runs.readable(QUICK, "fine_tune")
        alone = runs.run(runs.configure(**given, method="fine_tune", output_dir=str(folder)))
        assert alone.teacher is None and alone.run_id != record.run_id
        assert set(alone.oracle) == {"validation/kl", "test/kl", "train/flipped_given", "train/flipped_clean"}
        assert alone.oracle["test/kl"] > 0

    def test_regression_end_to_end(self, folder):
        done = runs.run(runs.configure(**{**QUICK, "task": "mini-stsb"}, output_dir=str(folder)))
        assert set(done.metrics) == {f"{s}/{m}" for s in ("validation", "test") for m in ("pearson", "spearmanr")}
        assert done.oracle == {}
        scores = pd.read_csv(done.folder / "mini-stsb.tsv", sep="\t")["prediction"]
        assert scores.between(0, 5).all()

    def test_a_data_set_of_ones_own(self, tmp_path, folder, record):
        for split, count in (("train", 24), ("validation", 8)):
            rows = pd.DataFrame({"review": ["the film was good", "the film was bad"] * (count // 2)})
            rows["stars"] = [1, 0] * (count // 2)
            rows.to_csv(tmp_path / f"{split}.csv", index=False)
        tokenizer = models.load_tokenizer("tiny-1x32")
        network = models.load("tiny-1x32", glue.task_for("mini-sst2"), tokenizer)
        engine.save_pretrained(network, tokenizer, tmp_path / "start")
        done = runs.run(
            runs.configure(
                source=str(tmp_path),
                task="films",
                text_columns="review",
                label_column="stars",
                method="fine_tune",
                student=str(tmp_path / "start"),
                max_steps=2,
                device="cpu",
                output_dir=str(tmp_path / "out"),
            )
        )
        assert set(done.metrics) == {"validation/accuracy"} and done.run_id.startswith("films-fine_tune-seed0-")

    def test_different_tokenizers_are_refused(self, record, tmp_path):
        tokenizer = models.load_tokenizer("tiny-1x32")
        words = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)]
        words[-1] = "another"
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
        network = models.load("tiny-1x32", glue.task_for("mini-mnli"), tokenizer)
        engine.save_pretrained(network, type(tokenizer)(vocab=str(tmp_path / "vocab.txt")), tmp_path / "other")
        with pytest.raises(ValueError, match="have different tokenizers"):
            runs.run(runs.configure(**{**QUICK, "student": str(tmp_path / "other")}, output_dir=str(tmp_path)))

    def test_a_shape_is_a_student_in_its_teachers_vocabulary(self):
        config, tokenizer = runs.configure(**{**QUICK, "student": "tutor-5.7m"}), models.load_tokenizer("tiny-1x32")
        student = runs.load_student(config, config.glue_task, tokenizer)
        assert student.config.vocab_size == len(tokenizer) and student.config.hidden_size == 264


IMITATION = {"alpha": 0.5, "temperature": 2.0, "objective": "kl"}
PILOT = {
    "pilot_update": True,
    "inner_steps": 1,
    "pilot_rule": "sgd",
    "pilot_learning_rate": None,
    "tangent": "jvp",
    "tangent_precision": "fp32",
    "feedback_batch_size": 32,
    "observe": False,
}
ONLINE = {"teacher_alpha": 0.5, "teacher_objective": "kl", "first": "teacher", "zero_classifiers": True}
IKD = {name: PILOT[name] for name in ("pilot_learning_rate", "tangent", "tangent_precision")} | {
    "meta_weight": 0.5,
    "feedback_at": "before",
    "exam": "course",
    "feedback_batch_size": None,
}
OLD_NAMES = [
    "mini-mnli-prokt-seed0-bbd94b63",
    "mini-mnli-dml-seed0-6eee2f73",
    "mini-mnli-metadistil-seed0-3bf77a81",
]
OTHERS = {
    "pkd_weight": 0.5,
    "pkd_layers": "last",
    "pkd_normalisation": "mean",
    "teaching_rate": 1e-4,
    "teacher_alpha": 0.1,
    "teacher_objective": "reverse_kl",
    "first": "student",
    "zero_classifiers": True,
    "pilot_update": False,
    "inner_steps": 2,
    "pilot_learning_rate": 0.1,
    "tangent": "finite-difference",
    "tangent_precision": "autocast",
    "pilot_pieces": 2,
    "feedback_batch_size": 8,
    "observe": True,
    "meta_weight": 0.25,
    "feedback_at": "after",
    "exam": "train",
    "influence": "meta",
    "influence_weight": "student_rate",
    "feedback_every": 2,
    "feedback_layers": 1,
}
CHANGED = {
    "alpha": 0.3,
    "temperature": 3.0,
    "objective": "reverse_kl",
    "teacher_epochs": 3,
    "teacher_learning_rate": 3e-3,
    "teacher_seed": 7,
    "teaching_rate": 2e-4,
    "labelled_course": False,
    "untrained_teacher": True,
    "zero_classifiers": False,
    "pilot_rule": "adamw",
    "feedback_from": "validation",
    "influence_share": 0.3,
}
"""Further values that no default has."""
WEIGHTED = {"influence": "weighted", "influence_weight": 1.0, "influence_share": None, "feedback_every": 1}
LGTM = {
    name: value for name, value in {**ONLINE, **PILOT}.items() if name not in ("first", "pilot_update", "inner_steps")
}


class TestTeachersThatLearn:
    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            ("kd", {"teacher_epochs": 12, "feedback_fraction": 0.0}),
            ("prokt", {"teacher_epochs": 0, "teaching_rate": 1e-3, "feedback_fraction": 0.0, **ONLINE}),
            (
                "dml",
                {"teacher_epochs": 0, "teaching_rate": 1e-3, **ONLINE, "first": "simultaneous", "temperature": 1.0},
            ),
            ("metadistil", {"teacher_epochs": 12, "teaching_rate": 1e-4, "feedback_fraction": 0.1, **PILOT}),
            ("ikd", {"teacher_epochs": 12, "teaching_rate": 1e-4, "feedback_fraction": 0.0, **IKD}),
            ("lgtm", {"teacher_epochs": 0, "teaching_rate": 1e-3, "feedback_fraction": 0.1, **LGTM, **WEIGHTED}),
        ],
    )
    def test_defaults_by_method(self, method, expected):
        config = dataclasses.asdict(runs.configure(method=method))
        expected = {**IMITATION, **expected}
        assert {name: config[name] for name in expected} == pytest.approx(expected)
        assert {name for name in runs.OF_METHODS if config[name] is not None} <= expected.keys()

    def test_defaults_follow_other_fields(self):
        config = runs.configure(method="prokt", alpha=0.2, objective="reverse_kl", teacher_epochs=2, batch_size=16)
        assert (config.teacher_alpha, config.teacher_objective, config.zero_classifiers) == (0.2, "reverse_kl", False)
        assert not runs.configure(method="prokt", teacher="book-teacher").zero_classifiers
        config = runs.configure(method="metadistil", teacher_learning_rate=1e-2, batch_size=16, pkd_weight=0.5)
        assert (config.teaching_rate, config.feedback_batch_size) == (pytest.approx(1e-3), 16)
        assert (config.pkd_layers, config.pkd_normalisation) == ("skip", "sum")
        for method, fraction in (("lgtm", 0.1), ("prokt", 0.0)):
            config = runs.configure(method=method, objective="dist")
            assert (config.zero_classifiers, config.teacher_objective) == (False, "dist")
            assert config.feedback_fraction == fraction
        config = runs.configure(method="lgtm", influence="released")
        assert (config.influence_weight, config.pilot_rule) == ("teacher_rate", "adamw")
        config = runs.configure(method="lgtm", influence="meta", influence_share=0.3)
        assert (config.influence_weight, config.influence_share, config.pilot_rule) == (None, 0.3, "sgd")
        config = runs.configure(method="lgtm", feedback_from="validation")
        assert (config.feedback_from, config.feedback_fraction) == ("validation", 0.0)
        config = runs.configure(task="mini-stsb", method="prokt")
        assert (config.objective, config.teacher_objective) == ("logit_mse", "logit_mse")

    @pytest.mark.parametrize("method", runs.METHODS)
    def test_fields_of_other_methods_are_refused_in_one_message(self, method):
        """Catches a field that leaks into another method's run id."""
        used = runs.readable(OTHERS, method)
        config = runs.configure(method=method, **used)
        assert all(getattr(config, name) == value for name, value in used.items())
        counts = {"fine_tune": 0, "kd": 3, "prokt": 8, "dml": 8, "metadistil": 12, "ikd": 11, "lgtm": 17}
        assert len(used) == counts[method]
        with pytest.raises(ConfigurationError) as caught:
            runs.configure(method=method, **OTHERS)
        said = re.search(rf"method '{method}' does not read (.*): leave them out", str(caught.value))[1]
        assert {part.split(" = ")[0] for part in said.split("; ")} == OTHERS.keys() - used.keys()

    @pytest.mark.parametrize("name", configuration.READ_BY)
    @pytest.mark.parametrize("method", runs.METHODS)
    def test_a_field_is_read_or_refused_never_ignored(self, method, name):
        """A field that a method reads changes its run; any other is an error."""
        plain = {"method": method, **({"pkd_weight": 0.5} if name in ("pkd_layers", "pkd_normalisation") else {})}
        plain |= {"exam": "train"} if (method, name) == ("ikd", "feedback_batch_size") else {}
        value = {**OTHERS, **CHANGED}[name]
        if method in configuration.READ_BY[name]:
            assert runs.configure(**{**plain, name: value}).run_id != runs.configure(**plain).run_id
        else:
            with pytest.raises(ConfigurationError, match=rf"does not read .*{name} = "):
                runs.configure(**{**plain, name: value})

    def test_runs_without_a_learning_teacher_keep_their_names(self):
        """Their folders, and those of the teachers that are shared, were named before these fields were there."""
        names = [runs.configure(method=method).run_id for method in ("kd", "fine_tune")]
        assert names == ["mini-mnli-kd-seed0-1e586b23", "mini-mnli-fine_tune-seed0-e2d16116"]
        assert (
            configuration.teachers_config(runs.configure(method="metadistil", feedback_fraction=0.0001)).method
            == "fine_tune"
        )
        assert not set(runs.OF_METHODS) & set(runs.configure(method="kd").identity)

    def test_teachers_that_learn_keep_their_names_too(self):
        """Those of MetaDistil and online distillation were there before IKD."""
        names = [runs.configure(method=method).run_id for method in ("prokt", "dml", "metadistil")]
        assert names == OLD_NAMES

    def test_an_exam_has_data_and_a_batch_size_where_it_is_not_the_course(self):
        found = [runs.configure(method="ikd", exam=exam, batch_size=16) for exam in ("course", "train", "feedback")]
        assert [(c.feedback_fraction, c.feedback_batch_size) for c in found] == [(0.0, None), (0.0, 16), (0.1, 16)]

    @pytest.mark.parametrize("method", ["fine_tune", "kd", "ikd"])
    def test_without_labels_of_the_course_nobody_asks_for_any(self, method):
        config = runs.configure(method=method, labelled_course=False)
        assert (config.feedback_fraction, config.labelled_course) == (0.1, False)
        assert config.alpha == (None if method == "fine_tune" else 0.0)
        assert config.exam == ("feedback" if method == "ikd" else None)
        if method != "fine_tune":
            assert configuration.teachers_config(config).labelled_course is False
        assert runs.configure(method=method, labelled_course=True) == runs.configure(method=method)

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"method": "metadistil", "feedback_fraction": 0.0}, "metadistil needs a feedback split"),
            ({"method": "metadistil", "precision": "fp16"}, "metadistil needs 'bf16'"),
            ({"method": "prokt", "precision": "fp16"}, "prokt needs 'bf16'"),
            ({"method": "metadistil", "micro_batches": 2}, "micro_batches is 2: the pilot step needs the whole batch"),
            ({"method": "metadistil", "inner_steps": 2, "pilot_rule": "adamw"}, "only one step of AdamW"),
            ({"method": "metadistill"}, "did you mean 'metadistil'"),
            ({"method": "ikd", "precision": "fp16"}, "ikd needs 'bf16'"),
            ({"method": "ikd", "micro_batches": 2}, "micro_batches is 2: the pilot step needs the whole batch"),
            ({"method": "ikd", "exam": "feedback", "feedback_fraction": 0.0}, "feedback_fraction is 0, but labels or"),
            (
                {"method": "kd", "labelled_course": False, "feedback_fraction": 0.0},
                "feedback_fraction is 0, but labels",
            ),
            ({"method": "ikd", "exam": "quiz"}, "exam is 'quiz'; expected one of course, train, feedback"),
            ({"method": "ikd", "feedback_at": "first"}, "feedback_at is 'first'; expected one of before, after"),
            ({"method": "ikd", "meta_weight": 2}, "meta_weight is 2.0; expected a number between 0 and 1"),
            ({"method": "ikd", "labelled_course": False, "exam": "course"}, "exam is 'course', but only the feedback"),
            ({"method": "ikd", "labelled_course": False, "alpha": 0.5}, "alpha is 0.5, a weight for the labels of a"),
            ({"method": "kd", "labelled_course": False, "alpha": 0.5}, "alpha is 0.5, a weight for the labels of a"),
            ({"method": "prokt", "labelled_course": False}, "'prokt' does not read labelled_course = False"),
            ({"method": "lgtm", "feedback_fraction": 0.0}, "lgtm needs a feedback split"),
            (
                {"method": "lgtm", "feedback_fraction": 0.1, "feedback_from": "validation"},
                "feedback_from 'validation' are",
            ),
            ({"method": "lgtm", "feedback_from": "test"}, "feedback_from is 'test'; expected one of validation"),
            ({"method": "lgtm", "micro_batches": 2}, "micro_batches is 2: the pilot step needs the whole batch"),
            ({"method": "lgtm", "pilot_pieces": 0}, "pilot_pieces is 0; expected a positive number"),
            ({"method": "metadistil", "objective": "dist", "pilot_pieces": 2}, "pilot_pieces is 2: objective 'dist'"),
            ({"method": "lgtm", "alpha": 1.0}, "no teacher can influence it"),
            ({"method": "lgtm", "influence": "wieghted"}, "did you mean 'weighted'"),
            ({"method": "lgtm", "influence_weight": "students_rate"}, "expected a number ≥ 0 or one of student_rate"),
            ({"method": "lgtm", "influence_weight": -1}, "influence_weight is -1.0; expected a number ≥ 0"),
            ({"method": "lgtm", "influence_share": -1}, "influence_share is -1.0; expected 0 or more"),
            ({"method": "lgtm", "influence_weight": 1, "influence_share": 1}, "are both given; give one"),
            ({"method": "lgtm", "feedback_every": 0}, "feedback_every is 0; expected a positive number"),
            ({"method": "lgtm", "feedback_layers": -1}, "feedback_layers is -1; expected 0 or more"),
            ({"method": "kd", "objective": "dist", "micro_batches": 2}, "compares the samples of a whole batch"),
            ({"method": "lgtm", "precision": "fp16"}, "lgtm needs 'bf16'"),
            ({"objective": "reverse_soft_cross_entropy"}, "objective is 'reverse_soft_cross_entropy'; expected one of"),
            (
                {"method": "prokt", "teacher_objective": "reverse_soft_crossentropy"},
                "did you mean 'reverse_soft_cross_entropy'",
            ),
            ({"method": "prokt", "first": "both"}, "first is 'both'; expected one of teacher, student, simultaneous"),
            ({"pkd_weight": 1.0, "pkd_layers": "all"}, "pkd_layers is 'all'; expected one of skip, last"),
            ({"pkd_weight": 1.0, "pkd_normalisation": "max"}, "pkd_normalisation is 'max'; expected one of sum, mean"),
            ({"method": "metadistil", "pilot_rule": "adam"}, "did you mean 'adamw'"),
            (
                {"method": "metadistil", "tangent": "forward"},
                "tangent is 'forward'; expected one of jvp, finite-difference",
            ),
            (
                {"method": "metadistil", "tangent_precision": "bf16"},
                "tangent_precision is 'bf16'; expected one of fp32, autocast",
            ),
            ({"method": "metadistil", "inner_steps": 0}, "inner_steps is 0; expected a positive number"),
            (
                {"method": "metadistil", "pilot_learning_rate": 0},
                "pilot_learning_rate is 0.0; expected a positive number",
            ),
            ({"method": "prokt", "teaching_rate": float("nan")}, "teaching_rate is nan"),
            ({"pkd_weight": -1}, "pkd_weight is -1.0; expected 0 or more"),
            ({"method": "prokt", "teacher_alpha": 2}, "teacher_alpha is 2.0; expected a number between 0 and 1"),
            ({"pilot_updates": True}, "did you mean 'pilot_update'"),
            ({"task": "mini-stsb", "method": "prokt", "teacher_objective": "kl"}, "teacher_objective is 'kl', but"),
        ],
    )
    def test_single_problems(self, parameters, message):
        with pytest.raises(ConfigurationError, match=message) as caught:
            runs.configure(**parameters)
        assert str(caught.value).count("\n  - ") == 1

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("metadistil", {"observe": True, "feedback_batch_size": 4, "student": "tiny-2x32", "pkd_weight": 0.5}),
            ("metadistil", {"pilot_rule": "adamw", "pilot_update": False, "tangent": "finite-difference"}),
            ("ikd", {"student": "tiny-2x32", "pkd_weight": 0.5}),
            ("ikd", {"exam": "train", "feedback_at": "after", "feedback_batch_size": 4, "meta_weight": 1.0}),
            ("ikd", {"exam": "feedback", "tangent": "finite-difference"}),
            ("ikd", {"labelled_course": False, "feedback_fraction": 0.25}),
            ("prokt", {"teacher_objective": "reverse_soft_cross_entropy"}),
            ("lgtm", {"observe": True, "feedback_batch_size": 4, "student": "tiny-2x32", "pkd_weight": 0.5}),
            ("lgtm", {"influence": "released", "feedback_every": 2, "feedback_layers": 1, "precision": "bf16"}),
            (
                "lgtm",
                {"influence": "meta", "influence_share": 0.2, "objective": "dist", "tangent": "forward-difference"},
            ),
            ("dml", {"teacher_epochs": 1, "precision": "bf16"}),
        ],
    )
    def test_a_small_run_leaves_the_teacher_and_its_scores(self, folder, method, options):
        config = runs.configure(
            **{**QUICK, "max_steps": 2, "teacher_epochs": 1, **options}, method=method, output_dir=str(folder)
        )
        done = runs.run(config)
        scores = {"validation/accuracy", "teacher/validation/accuracy"}
        assert set(done.metrics) == scores | {"test/accuracy"} and done.samples["train"] <= 96
        logged = {"loss", "student_entropy", "teacher_entropy"}
        logged |= {"feedback_loss"} if method in (*runs.FEEDBACK, "ikd") else set()
        logged |= {"teacher_loss"} if method not in ("metadistil", "ikd") else set()
        logged |= {"influence_mean", "influence_std", "influence_positive"} if method == "lgtm" else set()
        if config.observe or config.influence_share is not None:
            watched = {"watch_better", "watch_equal", "watch_worse", "watch_gain", "teacher_closer"}
            logged |= {"influence_weight", "influence_ratio", "influence_cosine"} if method == "lgtm" else watched
        lost = {"validation/loss", "teacher/validation/loss"}
        told = {"step", "epoch", "learning_rate", *scores, *lost, *(f"train_{n}" for n in logged)}
        assert set(done.history[-1]) == told
        assert all(np.isfinite(value) for value in done.history[-1].values())
        if config.feedback_fraction:
            assert done.samples["feedback"] > 0 and done.samples["train"] + done.samples["feedback"] == 96

        data = runs.load_data(config)
        tokenizer = AutoTokenizer.from_pretrained(done.folder / engine.TEACHER_FOLDER)
        teacher = AutoModelForSequenceClassification.from_pretrained(done.folder / engine.TEACHER_FOLDER)
        split = glue.encode(data.evaluation["validation"], data.task, tokenizer, config.max_length)
        accuracy = (models.predict(teacher, split).argmax(1) == split.labels.numpy()).mean()
        if config.precision == "fp32":
            assert accuracy == pytest.approx(done.metrics["teacher/validation/accuracy"])
        if done.teacher is not None:
            before = AutoModelForSequenceClassification.from_pretrained(folder / done.teacher / engine.STUDENT)
            pairs = zip(teacher.parameters(), before.parameters(), strict=True)
            assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)

    @pytest.mark.parametrize("exam", ["course", "train", "feedback"])
    def test_course_and_exam_come_from_where_the_configuration_says(self, folder, monkeypatch, exam):
        """Catches exams from the validation split, or from rows that the student trains on where it must not."""
        size = {} if exam == "course" else {"feedback_batch_size": 8}
        config = runs.configure(
            **{**QUICK, "teacher_epochs": 1}, method="ikd", exam=exam, output_dir=str(folder), **size
        )
        seen: list[list[set[int]]] = []
        original = runs.ikd.ikd

        def watched(*arguments):
            step = original(*arguments)
            return lambda *data: seen.append([set(b["rows"].tolist()) for b in data]) or step(*data)

        monkeypatch.setattr(runs.ikd, "ikd", watched)
        runs.run(config)
        data = runs.load_data(config)
        encoded = runs.encode_all(data, models.load_tokenizer(config.teacher), config.max_length)
        rows = {name: set(split.rows.tolist()) for name, split in encoded.items()}
        assert len(seen) == 4 and all(data[0] <= rows["train"] for data in seen)
        if exam == "course":
            assert all(len(data) == 1 for data in seen)
        else:
            assert all(len(data[1]) <= 8 and data[1] <= rows[exam] for data in seen)
        if exam == "feedback":
            assert not rows["feedback"] & rows["train"]

    def test_without_labels_the_teacher_is_fine_tuned_on_the_feedback_split_alone(self, folder, monkeypatch):
        """And what is fine-tuned, taught and examined does not change when the labels of the course do."""
        options = {**QUICK, "teacher_epochs": 1, "feedback_fraction": 0.25, "labelled_course": False}
        original, ends, trained = runs.encode_all, [], []
        train = runs.trainer.train

        def noted(step, learners, encoded, *arguments, **more):
            trained.append(len(encoded))
            return train(step, learners, encoded, *arguments, **more)

        def spoiled(*arguments):
            encoded = original(*arguments)
            return {**encoded, "train": dataclasses.replace(encoded["train"], labels=encoded["train"].labels * 0 - 7)}

        monkeypatch.setattr(runs.trainer, "train", noted)
        for name, encode in (("as they are", original), ("spoiled", spoiled)):
            monkeypatch.setattr(runs, "encode_all", encode)
            config = runs.configure(**options, method="ikd", output_dir=str(folder / name))
            done = runs.run(config)
            ends.append((done.metrics, done.history))
        assert trained == [24, 72] * 2
        assert ends[0] == ends[1]


def feedback_seen(monkeypatch, **parameters) -> tuple[list[dict], dict[str, Encoded]]:
    """The feedback batches that a run's step gets, and the run's splits."""
    seen, splits, original = [], {}, runs.lgtm.lgtm

    def spying(*arguments, **options):
        step = original(*arguments, **options)

        def spied(batch, feedback):
            seen.append(feedback)
            return step(batch, feedback)

        return spied

    def encoding(*arguments, encode=runs.encode_all):
        splits.update(encode(*arguments))
        return splits

    monkeypatch.setattr(runs.lgtm, "lgtm", spying)
    monkeypatch.setattr(runs, "encode_all", encoding)
    runs.run(runs.configure(**QUICK, method="lgtm", batch_size=8, **parameters))
    return seen, splits


def sentences(encoded: Encoded) -> set[tuple[int, ...]]:
    pieces = encoded.input_ids.split(encoded.lengths.tolist())
    return {tuple(piece.tolist()) for piece in pieces}


def shown(batches: list[dict]) -> set[tuple[int, ...]]:
    masked = [(b["input_ids"], b["attention_mask"].bool()) for b in batches]
    return {tuple(row[keep].tolist()) for ids, mask in masked for row, keep in zip(ids, mask, strict=True)}


def test_the_feedback_is_never_from_the_validation_split_unless_asked_for(monkeypatch, tmp_path):
    """Told by the sentences themselves, not by the numbers of their rows."""
    seen, splits = feedback_seen(monkeypatch, output_dir=str(tmp_path))
    assert shown(seen) <= sentences(splits["feedback"]) and len(shown(seen)) > 4
    assert {row for batch in seen for row in batch["rows"].tolist()} <= set(splits["feedback"].rows.tolist())
    assert not set(splits["feedback"].rows.tolist()) & set(splits["train"].rows.tolist())
    assert not shown(seen) <= sentences(splits["validation"])


def test_the_papers_way_takes_the_feedback_from_the_validation_split(monkeypatch, tmp_path):
    seen, splits = feedback_seen(monkeypatch, output_dir=str(tmp_path), feedback_from="validation")
    assert shown(seen) <= sentences(splits["validation"]) and len(shown(seen)) > 4
    assert "feedback" not in splits and len(splits["train"]) == 96


class TestResults:
    def test_mean_standard_deviation_and_n_over_seeds(self, record, tmp_path):
        for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.9)):
            for temperature, shift in ((1.0, 0.0), (2.0, 0.05)):
                config = {**record.config, "seed": seed, "temperature": temperature}
                values = {"test/accuracy": accuracy + shift}
                name = f"{seed}-{temperature}"
                where = tmp_path / name
                where.mkdir()
                records.write_record(
                    dataclasses.replace(record, run_id=name, config=config, metrics=values, oracle={}, folder=where)
                )
        table = runs.results(tmp_path)
        assert list(table) == ["task", "method", "temperature", "metric", "mean", "std", "n"]
        first = table[table["temperature"] == 1.0].iloc[0]
        assert first["mean"] == pytest.approx(np.mean([0.5, 0.6, 0.9]))
        assert first["std"] == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1)) and first["n"] == 3
        assert runs.results(tmp_path, by=["method"])["n"].tolist() == [6]

    @pytest.mark.parametrize("by", [None, ["task"], ["task", "method"]])
    def test_runs_that_saw_different_rows_are_not_put_together(self, record, tmp_path, by):
        """As those of two methods, one of which keeps some rows for feedback."""
        for number, (method, rows) in enumerate((("kd", 96), ("kd", 96), ("lgtm", 86))):
            config = {**record.config, "method": method, "seed": number}
            fields = {"config": config, "metrics": {"test/accuracy": 0.5}, "oracle": {}, "samples": {"train": rows}}
            folder = tmp_path / str(number)
            folder.mkdir()
            records.write_record(dataclasses.replace(record, run_id=str(number), folder=folder, **fields))
        table = runs.results(tmp_path, by=by)
        assert dict(zip(table[records.ROWS], table["n"], strict=True)) == {96: 2, 86: 1}

    def test_an_empty_folder_gives_an_empty_table(self, tmp_path):
        assert runs.results(tmp_path).empty

    def test_flat_record_files_count_and_other_json_does_not(self, record, tmp_path):
        (tmp_path / "one.json").write_text((record.folder / "record.json").read_text())
        (tmp_path / "other.json").write_text(json.dumps({"something": "else"}))
        assert runs.results(tmp_path)["n"].tolist() == [1] * len(runs.results(tmp_path))

    def test_a_half_written_record_is_named(self, tmp_path):
        (tmp_path / "record.json").write_text('{"run_id": "x", "config"')
        with pytest.raises(ValueError, match=r"record\.json is not a complete run record"):
            runs.read_record(tmp_path)


def test_published_tables():
    whole = book.published()
    assert set(whole["paper"]) == {"LGTM", "MetaDistil", "IKD", "Tutor-KD"}
    rte = book.published("rte")
    assert set(rte["task"]) == {"rte"} and 0 < len(rte) < len(whole)


def test_published_tables_are_empty_without_the_repository(tmp_path):
    assert book.published(folder=tmp_path).empty


def test_the_processor_has_a_name_on_every_system(monkeypatch):
    assert machine.processor()

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(runs.Path, "read_text", absent)
    assert machine.processor()


def test_git_commit_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.kdlib, "__file__", str(tmp_path / "kdlib" / "__init__.py"))
    assert machine.git_commit() is None
