"""Configurations, runs end to end on a few steps, records and tables."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdlib import glue, models, runs
from kdlib.runs import ConfigurationError

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
    files = list((record.folder / runs.STUDENT).iterdir())
    assert {file.stat().st_mode for file in files} == {plain.stat().st_mode} and len(files) > 2


class TestConfigure:
    def test_defaults_are_complete(self):
        config = runs.configure()
        assert (config.source, config.task, config.method) == ("miniglue", "mini-mnli", "kd")
        left = {name for name, value in dataclasses.asdict(config).items() if value is None}
        limits = {"max_train", "max_evaluation", "max_steps", "evaluate_every", "checkpoint_every"}
        assert left == limits | {"text_columns", "student_layers", *runs.OF_METHODS}

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
        assert runs.teacher_config(config).learning_rate == teacher
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
            ({"student": "tiny-1x32", "student_layers": 2}, "student and student_layers are both given"),
            ({"task": "mini-stsb", "objective": "kl"}, "regression task, where a softmax has no meaning"),
            ({"teacher": "tiny4x128"}, "not of the form 'tiny-<layers>x<hidden>'"),
            ({"source": "glue", "task": "rte", "student": "minilm"}, "needs a pretrained teacher"),
            ({"source": "glue", "task": "rte", "teacher": "minilm"}, "needs a student"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"learning_rate": float("inf")}, "learning_rate is inf"),
            ({"teacher_epochs": -1}, "teacher_epochs is -1; expected 0 or more"),
            ({"precision": "fp61"}, "did you mean 'fp16'"),
            ({"task": "mine", "text_columns": "a,b,c"}, "expected one or two"),
        ],
    )
    def test_single_problems(self, parameters, message):
        with pytest.raises(ConfigurationError, match=message):
            runs.configure(**parameters)

    def test_an_integer_is_a_float_and_equal_configurations_share_an_identity(self):
        one, other = runs.configure(temperature=2), runs.configure(temperature=2.0, output_dir="x", resume=False)
        assert one.identity == other.identity and one.run_id == other.run_id
        assert one.run_id != runs.configure(temperature=3).run_id

    def test_what_fine_tuning_does_not_use_does_not_matter(self):
        one = runs.configure(method="fine_tune", alpha=0.1, temperature=9, teacher="tiny-1x32", teacher_seed=4)
        assert one.run_id == runs.configure(method="fine_tune").run_id

    def test_regression_distils_logits(self):
        assert runs.configure(task="mini-stsb").objective == "logit_mse"

    def test_the_teacher_is_shared_by_runs_that_differ_in_the_student_only(self):
        one = runs.teacher_config(runs.configure(seed=1, temperature=4, alpha=0.2))
        other = runs.teacher_config(runs.configure(seed=2, student="tiny-1x64", learning_rate=1e-4))
        assert one.run_id == other.run_id and one.method == "fine_tune" and one.student == runs.TEACHER
        assert runs.teacher_config(runs.configure(teacher_seed=1)).run_id != one.run_id

    def test_no_teacher_to_fine_tune(self):
        for parameters in ({"method": "fine_tune"}, {"teacher_epochs": 0}):
            with pytest.raises(ValueError, match="fine-tunes no teacher"):
                runs.teacher_config(runs.configure(**parameters))


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

    def test_resume_false_runs_again_with_the_same_result_and_keeps_the_teacher(self, record, config, monkeypatch):
        calls = []
        train = runs.trainer.train
        monkeypatch.setattr(runs.trainer, "train", lambda *a, **k: calls.append(1) or train(*a, **k))
        again = runs.run(dataclasses.replace(config, resume=False))
        assert calls == [1]
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

    def test_the_student_alone_and_the_oracle(self, folder, record):
        alone = runs.run(runs.configure(**QUICK, method="fine_tune", output_dir=str(folder)))
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
        runs.save_pretrained(network, tokenizer, tmp_path / "start")
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
        runs.save_pretrained(network, type(tokenizer)(vocab=str(tmp_path / "vocab.txt")), tmp_path / "other")
        with pytest.raises(ValueError, match="have different tokenizers"):
            runs.run(runs.configure(**{**QUICK, "student": str(tmp_path / "other")}, output_dir=str(tmp_path)))


class TestResults:
    def test_mean_standard_deviation_and_n_over_seeds(self, record, tmp_path):
        for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.9)):
            for temperature, shift in ((1.0, 0.0), (2.0, 0.05)):
                config = {**record.config, "seed": seed, "temperature": temperature}
                values = {"test/accuracy": accuracy + shift}
                name = f"{seed}-{temperature}"
                where = tmp_path / name
                where.mkdir()
                runs.write_record(
                    dataclasses.replace(record, run_id=name, config=config, metrics=values, oracle={}, folder=where)
                )
        table = runs.results(tmp_path)
        assert list(table) == ["task", "method", "temperature", "metric", "mean", "std", "n"]
        first = table[table["temperature"] == 1.0].iloc[0]
        assert first["mean"] == pytest.approx(np.mean([0.5, 0.6, 0.9]))
        assert first["std"] == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1)) and first["n"] == 3
        assert runs.results(tmp_path, by=["method"])["n"].tolist() == [6]

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
    whole = runs.published()
    assert set(whole["paper"]) == {"LGTM", "MetaDistil", "IKD", "Tutor-KD"}
    rte = runs.published("rte")
    assert set(rte["task"]) == {"rte"} and 0 < len(rte) < len(whole)


def test_published_tables_are_empty_without_the_repository(tmp_path):
    assert runs.published(folder=tmp_path).empty


def test_the_processor_has_a_name_on_every_system(monkeypatch):
    assert runs.processor()

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(runs.Path, "read_text", absent)
    assert runs.processor()


def test_git_commit_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.kdlib, "__file__", str(tmp_path / "kdlib" / "__init__.py"))
    assert runs.git_commit() is None
