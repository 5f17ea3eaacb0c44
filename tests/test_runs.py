"""Runs on a task, end to end on a few steps: what they leave, who takes part, and what stops them before any work."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from kdlib import configuration, engine, glue, learner, models, runs, trainer
from kdlib.batches import Encoded
from kdlib.methods import METHODS, ikd, lgtm
from kdlib.methods.kd import KD
from kdlib.settings import ConfigurationError, read_by, settings

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


class TestRun:
    def test_the_record_is_complete_and_comes_back(self, record, config):
        assert record.config == config.flat
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
        monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("ran again"))
        assert runs.run(config) == record

    def test_resume_false_runs_again_with_the_same_result_and_so_does_the_teacher(self, record, config, monkeypatch):
        calls = []
        train = trainer.train
        monkeypatch.setattr(trainer, "train", lambda *a, **k: calls.append(1) or train(*a, **k))
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
        monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("trained"))
        own = {"source": str(tmp_path), "task": "mine", "text_columns": "text", "untrained_teacher": True}
        config = runs.configure(
            **networks, **own, teacher_epochs=0, max_length=200, device="cpu", output_dir=str(tmp_path / "runs")
        )
        message = rf"reads 64 word pieces at most, but row 5 of {split} has \d+: give max_length 64"
        with pytest.raises(ValueError, match=message):
            runs.run(config)

    @pytest.mark.usefixtures("few_to_test")
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

    @pytest.mark.usefixtures("few_to_test")
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

    @pytest.mark.usefixtures("few_to_test")
    def test_both_learners_train_as_the_configuration_says(self, folder, monkeypatch):
        """Catches an optimiser that is given another setting than its own, in the run of the teacher, too."""
        made, schedules, train = [], [], trainer.train

        def noted(training, *arguments, **options):
            for who in training.learners:
                group = who.optimizer.param_groups[0]
                found = group["initial_lr"], group["weight_decay"], group["lr"], who.max_grad_norm, who.micro_batches
                made.append((who.name, *found))
            schedules.append(training.schedule)
            return train(training, *arguments, **options)

        monkeypatch.setattr(trainer, "train", noted)
        student = {"learning_rate": 3e-3, "weight_decay": 0.2, "max_grad_norm": 0.25, "batch_size": 16, "epochs": 2}
        student |= {"warmup_ratio": 0.5}
        teacher = {"learning_rate": 4e-3, "weight_decay": 0.3, "max_grad_norm": 0.5, "batch_size": 24, "epochs": 1}
        teacher |= {"micro_batches": 2, "evaluate_every": 2, "seed": 3, "warmup_ratio": 0.0}
        given = {**QUICK, **student, **{f"teacher_{name}": value for name, value in teacher.items()}}
        config = runs.configure(**given, method="ikd", teaching_rate=5e-4, output_dir=str(folder))
        runs.run(config)
        assert made == [
            ("student", 4e-3, 0.3, 4e-3, 0.5, 2),  # of the teacher's own run, which has no warm-up
            ("student", 3e-3, 0.2, 0.0, 0.25, 1),
            ("teacher", 5e-4, 0.2, 0.0, 0.25, 1),
        ]
        of_teacher, of_student = schedules
        assert of_teacher == trainer.Schedule(1, 24, 4, 2, None, 3)
        assert of_student == trainer.Schedule(2, 16, 4, None, None, 0)

    def test_gradients_are_clipped_at_one_unless_the_configuration_says_otherwise(self, config):
        network = models.load("tiny-1x32", config.glue_task, models.load_tokenizer("tiny-1x32"))
        for norm, expected in ((None, 1.0), (0.25, 0.25)):
            other = dataclasses.replace(config, max_grad_norm=norm)
            made = runs._learner("student", network, other, learner.accelerator_for("cpu"), 96)
            assert made.max_grad_norm == expected

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


@pytest.mark.usefixtures("few_to_test")
class TestChains:
    """A teacher may be a run of any method: a distilled one, as a teaching assistant is."""

    @pytest.fixture
    def assisted(self, monkeypatch):
        """A method whose teacher is itself distilled, from a larger one."""

        @settings
        class Assisted(KD):
            assistant: str = "tiny-1x64"

            def teachers_run(self, run):
                own = super().teachers_run(run)
                assert own is not None
                own |= {"method": "kd", "student": self.assistant, "teacher": run.teacher, "temperature": 4.0}
                return {**own, "teacher_epochs": 1, "epochs": 2}

        monkeypatch.setitem(METHODS, "assisted", Assisted)
        monkeypatch.setattr(configuration, "READ_BY", read_by(configuration.RunConfig, METHODS))

    def test_a_teacher_that_is_distilled_itself(self, assisted, tmp_path):
        config = runs.configure(**QUICK, method="assisted", output_dir=str(tmp_path))
        assistant = configuration.teachers_config(config)
        first = configuration.teachers_config(assistant)
        assert (assistant.method, assistant.teacher, assistant.student) == ("kd", "tiny-2x32", "tiny-1x64")
        assert (assistant.epochs, assistant.settings.temperature, config.settings.temperature) == (2, 4.0, 2.0)
        assert (first.method, first.student, first.epochs) == ("fine_tune", "tiny-2x32", 1)
        assert configuration.teachers_config(first) is None

        record = runs.run(config)
        assert {path.name for path in tmp_path.iterdir()} == {c.run_id for c in (config, assistant, first)}
        assert record.teacher == assistant.run_id
        assert runs.read_record(assistant.folder).teacher == first.run_id
        hidden = [
            AutoModelForSequenceClassification.from_pretrained(c.folder / engine.STUDENT).config.hidden_size
            for c in (config, assistant, first)
        ]
        assert hidden == [32, 64, 32]
        # The student learns from the assistant's logits, which are kept beside the assistant.
        assert len(list(assistant.folder.glob("logits-*"))) == len(list(first.folder.glob("logits-*"))) == 1

    def test_the_whole_chain_starts_afresh(self, assisted, tmp_path, monkeypatch):
        told: list[str] = []
        config = runs.configure(**QUICK, method="assisted", output_dir=str(tmp_path), resume=False)
        monkeypatch.setattr(runs, "notice", told.append)
        assistant = configuration.teachers_config(config)
        assert runs.afresh(config).resume is True
        ids = [config.run_id, assistant.run_id, configuration.teachers_config(assistant).run_id]
        assert told == [f"resume is False: {' and '.join(ids)} start afresh"]


@pytest.mark.usefixtures("few_to_test")
class TestTeachersThatLearn:
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
        logged |= {"feedback_loss"} if method in ("metadistil", "lgtm", "ikd") else set()
        logged |= {"teacher_loss"} if method not in ("metadistil", "ikd") else set()
        logged |= {"influence_mean", "influence_std", "influence_positive"} if method == "lgtm" else set()
        if config.flat["observe"] or config.flat["influence_share"] is not None:
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
        original = ikd.ikd

        def watched(*arguments):
            step = original(*arguments)
            return lambda *data: seen.append([set(b["rows"].tolist()) for b in data]) or step(*data)

        monkeypatch.setattr(ikd, "ikd", watched)
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
        train = trainer.train

        def noted(training, *arguments, **more):
            trained.append(len(training.data))
            return train(training, *arguments, **more)

        def spoiled(*arguments):
            encoded = original(*arguments)
            return {**encoded, "train": dataclasses.replace(encoded["train"], labels=encoded["train"].labels * 0 - 7)}

        monkeypatch.setattr(trainer, "train", noted)
        for name, encode in (("as they are", original), ("spoiled", spoiled)):
            monkeypatch.setattr(runs, "encode_all", encode)
            config = runs.configure(**options, method="ikd", output_dir=str(folder / name))
            done = runs.run(config)
            ends.append((done.metrics, done.history))
        assert trained == [24, 72] * 2
        assert ends[0] == ends[1]


def feedback_seen(monkeypatch, **parameters) -> tuple[list[dict], dict[str, Encoded]]:
    """The feedback batches that a run's step gets, and the run's splits."""
    seen, splits, original = [], {}, lgtm.lgtm

    def spying(*arguments, **options):
        step = original(*arguments, **options)

        def spied(batch, feedback):
            seen.append(feedback)
            return step(batch, feedback)

        return spied

    def encoding(*arguments, encode=runs.encode_all):
        splits.update(encode(*arguments))
        return splits

    monkeypatch.setattr(lgtm, "lgtm", spying)
    monkeypatch.setattr(runs, "encode_all", encoding)
    runs.run(runs.configure(**QUICK, method="lgtm", batch_size=8, **parameters))
    return seen, splits


def sentences(encoded: Encoded) -> set[tuple[int, ...]]:
    pieces = encoded.input_ids.split(encoded.lengths.tolist())
    return {tuple(piece.tolist()) for piece in pieces}


def shown(batches: list[dict]) -> set[tuple[int, ...]]:
    masked = [(b["input_ids"], b["attention_mask"].bool()) for b in batches]
    return {tuple(row[keep].tolist()) for ids, mask in masked for row, keep in zip(ids, mask, strict=True)}


@pytest.mark.usefixtures("few_to_test")
def test_the_feedback_is_never_from_the_validation_split_unless_asked_for(monkeypatch, tmp_path):
    """Told by the sentences themselves, not by the numbers of their rows."""
    seen, splits = feedback_seen(monkeypatch, output_dir=str(tmp_path))
    assert shown(seen) <= sentences(splits["feedback"]) and len(shown(seen)) > 4
    assert {row for batch in seen for row in batch["rows"].tolist()} <= set(splits["feedback"].rows.tolist())
    assert not set(splits["feedback"].rows.tolist()) & set(splits["train"].rows.tolist())
    assert not shown(seen) <= sentences(splits["validation"])


@pytest.mark.usefixtures("few_to_test")
def test_the_papers_way_takes_the_feedback_from_the_validation_split(monkeypatch, tmp_path):
    seen, splits = feedback_seen(monkeypatch, output_dir=str(tmp_path), feedback_from="validation")
    assert shown(seen) <= sentences(splits["validation"]) and len(shown(seen)) > 4
    assert "feedback" not in splits and len(splits["train"]) == 96
