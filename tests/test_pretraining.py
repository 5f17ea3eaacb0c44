"""Task-agnostic distillation as a run: configurations, a few steps of every method, what they leave, and errors."""

import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor, wait

import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from kdlib import checkpoints, corpus, engine, folders, miniglue, models, pretraining, records, runs, trainer
from kdlib.methods import ON_TEXT
from kdlib.pretraining import PretrainingConfig
from kdlib.records import NOT_IDENTITY, RunRecord
from kdlib.settings import ConfigurationError, names
from kdlib.trainer import TrainingInterruptedError

LINES, EMPTY = 60, 3
COMMON = {"steps": 3, "batch_size": 8, "max_length": 32, "evaluate_every": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


@pytest.fixture(scope="module")
def text(home):
    """A text file of our own: sentences, empty lines, and one line that is not UTF-8."""
    lines = (miniglue.folder() / "mini-corpus" / "train.txt").read_bytes().splitlines()[:LINES]
    path = home / "own.txt"
    path.write_bytes(b"\n".join([*lines, *[b""] * EMPTY, b"\xff\xfe bad"]) + b"\n")
    return str(path)


@pytest.fixture(scope="module")
def taught(home, text):
    """The record of a teacher: a masked language model, trained for a few steps on the text."""
    settings = {"method": "mlm", "student": "tiny-2x64", "corpus": text, "output_dir": str(home / "runs")}
    return pretraining.run(pretraining.configure(**COMMON, **settings))


@pytest.fixture(scope="module")
def quick(home, text, taught):
    """The settings of a quick run, all but the method."""
    teacher = str(taught.folder / engine.STUDENT)
    return {**COMMON, "corpus": text, "teacher": teacher, "student": "tiny-1x32h2", "output_dir": str(home / "runs")}


def tutor_of(record: RunRecord) -> dict[str, bytes]:
    """The tutor's tensors, bit for bit; the file's header may list its entries in any order."""
    tensors, _ = checkpoints.read_tensors(record.folder / pretraining.TUTOR_WEIGHTS)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


CHANGES = {
    "corpus": "mini-corpus+mini-corpus",
    "column": "words",
    "train_split": "validation",
    "validation_split": "train",
    "packed": True,
    "max_length": 64,
    "max_lines": 50,
    "mask_rate": 0.3,
    "method": "untutored",
    "teacher": "other",
    "student": "tiny-1x32",
    "student_layers": 1,
    "untrained_teacher": True,
    "trained": "head",
    "steps": 7,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "warmup_ratio": 0.0,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "temperature": 3.0,
    "relation_heads": 2,
    "attention": False,
    "logit_weight": 1.0,
    "inner_weight": 1.0,
    "reward_weight": 0.25,
    "strategy": "reverse",
    "kl_weight": 0.5,
    "samples": 2,
    "baseline": "running mean",
    "imitated": "distribution",
    "everywhere": True,
    "order": "in turns",
    "tutor_start": "random",
    "seed": 1,
    "evaluate_every": 7,
    "precision": "bf16",
}
"""A value of every field that is not its default."""


class TestConfigure:
    @pytest.mark.parametrize(
        ("method", "filled"),
        [
            ("soft_labels", {"temperature": 1.0}),
            ("distilbert", {"temperature": 2.0}),
            ("tinybert", {}),
            ("minilm", {}),
            ("minilm_v2", {}),
            ("untutored", {"logit_weight": 25.0, "inner_weight": 0.5}),
            (
                "tutor",
                {
                    "logit_weight": 25.0,
                    "inner_weight": 0.5,
                    "temperature": 1.0,
                    "reward_weight": 0.5,
                    "strategy": "tutor",
                    "kl_weight": 1.0,
                    "samples": 1,
                    "baseline": "none",
                    "imitated": "modified",
                    "everywhere": False,
                    "order": "together",
                    "tutor_start": "teacher",
                },
            ),
        ],
    )
    def test_defaults_by_method(self, method, filled):
        config = pretraining.configure(method=method)
        assert (config.teacher, config.student, config.corpus) == ("book-mlm", "tiny-2x64h4", "mini-corpus")
        assert (config.learning_rate, config.evaluate_every) == (1e-3, 30)
        own = {name: value for name, value in config.settings.flat.items() if value is not None}
        assert own == filled
        assert {name for name in pretraining.READ_BY if config.flat[name] is not None} - {"teacher"} == set(filled)

    def test_without_a_teacher(self):
        config = pretraining.configure(method="mlm", student="tiny-1x32")
        assert (config.teacher, config.settings.trained) == (None, "all")
        with pytest.raises(ConfigurationError, match="'mlm' does not read teacher = 'book-mlm'"):
            pretraining.configure(method="mlm", student="tiny-1x32", teacher="book-mlm")

    @pytest.mark.parametrize(("student", "rate"), [("tiny-2x64", 1e-3), ("tutor-9m", 5e-4), ("some/where", 5e-4)])
    def test_learning_rates_suit_the_student(self, student, rate):
        assert pretraining.configure(student=student).learning_rate == rate
        assert pretraining.configure(student=student, learning_rate=1e-4).learning_rate == 1e-4

    def test_all_problems_in_one_message_with_the_nearest_names(self):
        wrong = {"stpes": 3, "method": "tutors", "steps": 0, "seed": True, "mask_rate": 1.0, "warmup_ratio": -0.1}
        with pytest.raises(ConfigurationError) as caught:
            pretraining.configure(**wrong, student="tiny-1x32", student_layers=2, max_seconds=float("inf"))
        message = str(caught.value)
        assert message.count("\n  - ") == 8
        assert "unknown parameter 'stpes'; did you mean 'steps'" in message
        assert "did you mean 'tutor' or 'untutored'?" in message
        assert "steps is 0; expected a positive number" in message and "seed is True (bool); expected int" in message
        assert "mask_rate is 1.0; expected a number above 0 and below 1" in message

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"method": "mlm"}, "method 'mlm' trains a network of its own: give student"),
            ({"corpus": "wikitext"}, "corpus 'wikitext' needs a pretrained teacher"),
            ({"corpus": "wikitext", "teacher": "tiny-2x32"}, "needs a pretrained teacher"),
            ({"strategy": "kind"}, "strategy is 'kind'; expected one of tutor, reverse"),
            ({"baseline": "leave one out"}, "needs samples of 2 or more"),
            ({"reward_weight": 1.5}, "weight is 1.5"),
            ({"temperature": 0.5}, "temperature is 0.5; .* expected 1 or more"),
            ({"everywhere": True, "imitated": "distribution"}, "needs imitated='modified'"),
            ({"tutor_start": "zero"}, "tutor_start is 'zero'; expected one of teacher, random"),
            ({"method": "soft_labels", "temperature": 0.0}, "temperature is 0.0; expected a positive number"),
            ({"logit_weight": -1.0}, "logit_weight is -1.0; expected 0 or more"),
            ({"precision": "fp16"}, "precision is 'fp16'; expected one of fp32, bf16"),
            ({"teacher": "minilm"}, "'minilm' comes without a trained masked-language-model head, and tutor asks it"),
            (
                {"teacher": "tiny-2x32", "method": "soft_labels"},
                "comes without a trained .* head, and soft_labels asks",
            ),
            ({"student": "tiny-1x16"}, "'tiny-1x16': a tiny BERT needs .* a width that is a multiple of 32"),
            ({"student": "tiny2x32"}, "not of the form 'tiny-<layers>x<hidden>'"),
            ({"teacher": "tiny-1x16", "untrained_teacher": True}, "'tiny-1x16': a tiny BERT needs"),
            ({"seed": 2**32}, "seed is 4294967296; expected 4,294,967,295 at most"),
            ({"corpus": ""}, "corpus is ''; expected a name or a path"),
        ],
    )
    def test_what_means_nothing_is_refused(self, wrong, message):
        with pytest.raises(ConfigurationError, match=message):
            pretraining.configure(**wrong)

    def test_a_teacher_without_a_head_may_show_what_is_inside_it(self):
        for method in ("tinybert", "minilm", "minilm_v2"):
            assert pretraining.configure(method=method, teacher="minilm").teacher == "minilm"

    @pytest.mark.parametrize(
        ("given", "unused"),
        [
            (
                {"method": "soft_labels"},
                {"samples": 3, "baseline": "running mean", "attention": True, "trained": "head"},
            ),
            ({"method": "minilm"}, {"temperature": 3.0, "relation_heads": 4, "logit_weight": 1.0}),
            ({"method": "untutored"}, {"reward_weight": 0.1, "temperature": 2.0, "order": "in turns"}),
            ({"method": "mlm", "student": "tiny-1x32"}, {"teacher": "tiny-2x32", "kl_weight": 0.0}),
            ({"imitated": "distribution"}, {"temperature": 3.0}),
            ({"strategy": "no reward"}, {"reward_weight": 0.1, "baseline": "running mean"}),
            ({"inner_weight": 0.0}, {"attention": False}),
            ({}, {"column": "words"}),
        ],
    )
    def test_fields_without_meaning_are_refused_each_by_its_name(self, given, unused):
        for name, value in unused.items():
            with pytest.raises(ConfigurationError, match=rf"{name} (= |is ).*out"):
                pretraining.configure(**given, **{name: value})

    def test_the_usual_names_of_the_mini_corpus_may_be_given(self):
        assert pretraining.configure(column="text", validation_split="validation") == pretraining.configure()

    @pytest.mark.parametrize("name", sorted(pretraining.READ_BY))
    @pytest.mark.parametrize("method", ON_TEXT)
    def test_a_field_is_read_or_refused_never_ignored(self, method, name):
        plain = {"method": method, **({"student": "tiny-1x32"} if method == "mlm" else {})}
        value = CHANGES[name]
        if method in pretraining.READ_BY[name]:
            assert pretraining.configure(**{**plain, name: value}).asked_id != pretraining.configure(**plain).asked_id
        else:
            with pytest.raises(ConfigurationError, match=rf"does not read .*{name} = "):
                pretraining.configure(**{**plain, name: value})

    def test_the_run_id_tells_results_apart(self):
        """Every field but those that decide nothing gives another run, and the list of them is complete."""
        fields = {*names(PretrainingConfig), *pretraining.READ_BY} - {"settings", *NOT_IDENTITY}
        assert set(CHANGES) == fields
        base = {"corpus": "a.txt", "teacher": "folder"}
        special = {
            "trained": {"method": "mlm", "student": "tiny-1x32", "teacher": None},
            "relation_heads": {"method": "minilm_v2"},
        }
        for name, value in CHANGES.items():
            given = {**base, **special.get(name, {})}
            changed = {**given, name: value}
            assert pretraining.configure(**given).asked_id != pretraining.configure(**changed).asked_id, name

    def test_where_and_how_often_it_is_saved_is_no_part_of_the_run_id(self):
        where = {"output_dir": "x", "cache_dir": "y", "resume": False, "device": "cpu", "checkpoint_every": 5}
        assert pretraining.configure(**where, max_seconds=3.0).run_id == pretraining.configure().run_id
        assert pretraining.configure().run_id.startswith("mini-corpus-tutor-seed0-")

    def test_a_record_gives_the_configuration_back(self):
        for method in ON_TEXT:
            config = pretraining.configure(method=method, student="tiny-1x32")
            again = pretraining.configure(**json.loads(json.dumps(config.flat)))
            assert again == config and again.run_id == config.run_id

    @pytest.mark.parametrize("name", [*names(PretrainingConfig), *pretraining.READ_BY])
    def test_whatever_is_given_the_answer_is_a_configuration_or_says_what_is_wrong_with_it(self, name):
        method = pretraining.READ_BY.get(name, ["tutor"])[0]
        given = {"method": method, **({"student": "tiny-1x32"} if method == "mlm" else {})}
        numbers = True, -1, 0, 0.5, 1, 1.0, math.nan, -math.inf, 10**400, 1e308
        for value in (*numbers, "", " ", "\0", "x", b"x", [], {"a": 1}, (), object()):
            try:
                pretraining.configure(**{**given, name: value})
            except ConfigurationError as error:
                assert name in str(error)

    def test_the_settings_are_those_of_the_configuration(self):
        config = pretraining.configure(samples=3, baseline="leave one out", order="in turns", attention=False)
        assert (config.settings.samples, config.settings.baseline) == (3, "leave one out")
        assert (config.settings.order, config.settings.attention) == ("in turns", False)


class TestRun:
    @pytest.mark.parametrize("method", ON_TEXT)
    def test_every_method_leaves_a_record_and_a_student_that_can_be_fine_tuned(self, quick, home, monkeypatch, method):
        config = pretraining.configure(**pretraining.readable(quick, method), method=method)
        record = pretraining.run(config)
        assert record.folder == config.folder and record.config == config.flat
        assert [row["step"] for row in record.history] == [2, 3] and record.best_step == 3
        last = record.history[-1]
        assert record.metrics == {name: value for name, value in last.items() if name.startswith("validation/")}
        assert {"train_loss", "validation/loss"} <= set(last)
        if method == "tutor":
            logged = {"teacher_reward", "student_reward", "teacher_nll", "student_nll", "copied"}
            assert logged <= {name.removeprefix("validation/") for name in record.metrics}
            assert {"train_tutor_loss", "train_copied"} <= set(last)
        files = {"record.json", "student"} | ({pretraining.TUTOR_WEIGHTS} if method == "tutor" else set())
        assert {path.name for path in record.folder.iterdir()} == files | {folders.LOCK}
        assert record.samples == {
            "train": 57,
            "validation": 3,
            "train/lines": LINES + EMPTY + 1,
            "train/empty": EMPTY,
            "train/undecodable": 1,
            "train/cut": 0,
            "train/unknown": 0,
            "train/blocks": LINES,
            "train/tokens": record.samples["train/tokens"],
        }
        student = record.folder / engine.STUDENT
        network = AutoModel.from_pretrained(student)
        assert len(AutoTokenizer.from_pretrained(student)) == network.config.vocab_size
        found, missing = AutoModelForMaskedLM.from_pretrained(student, output_loading_info=True)
        assert found.config.hidden_size == 32
        headed = not [name for name in missing["missing_keys"] if name.startswith("cls.")]
        assert headed == (method in ("mlm", "soft_labels", "distilbert", "untutored"))

        settings = {"task": "mini-sst2", "method": "fine_tune", "student": str(student), "max_train": 96}
        settings |= {"max_evaluation": 8, "max_steps": 1, "predict_test": False, "device": "cpu"}
        tuned = runs.run(runs.configure(**settings, output_dir=str(home / "tuned")))
        assert tuned.best_step == 1 and 0 <= tuned.metrics["validation/accuracy"] <= 1

        monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("computed again"))
        assert pretraining.run(config) == record

    def test_two_runs_are_equal_bit_for_bit_and_seeds_differ(self, quick, tmp_path):
        ends = []
        for number, seed in enumerate((0, 0, 1)):
            settings = {**quick, "output_dir": str(tmp_path / str(number)), "seed": seed}
            record = pretraining.run(pretraining.configure(**settings, samples=2, baseline="leave one out"))
            weights = (record.folder / "student" / "model.safetensors").read_bytes()
            ends.append((weights, tutor_of(record), record.history))
        assert ends[0] == ends[1] and ends[0][0] != ends[2][0]

    def test_the_tutors_head_alone_is_stored_and_its_teacher_stays(self, quick, home):
        record = pretraining.run(pretraining.configure(**quick))
        teacher = AutoModelForMaskedLM.from_pretrained(quick["teacher"])
        weights, _ = checkpoints.read_tensors(record.folder / pretraining.TUTOR_WEIGHTS)
        head = {f"head.{name}": tensor for name, tensor in teacher.cls.state_dict().items()}
        assert set(weights) == {*head, "mean_reward"} and weights["mean_reward"] != 0
        assert any(not torch.equal(weights[name], tensor) for name, tensor in head.items())

    def test_with_distributions_the_tutored_student_keeps_its_head(self, quick):
        record = pretraining.run(pretraining.configure(**quick, imitated="distribution"))
        _, missing = AutoModelForMaskedLM.from_pretrained(record.folder / engine.STUDENT, output_loading_info=True)
        assert not missing["missing_keys"]

    def test_a_student_may_be_cut_from_its_teacher(self, quick):
        settings = {**quick, "student": None, "student_layers": 1, "learning_rate": 1e-9, "method": "minilm"}
        record = pretraining.run(pretraining.configure(**settings))
        cut, whole = (AutoModel.from_pretrained(path) for path in (record.folder / engine.STUDENT, quick["teacher"]))
        assert cut.config.num_hidden_layers == 1
        ours, theirs = (net.encoder.layer[0].attention.self.query.weight for net in (cut, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    def test_training_the_head_leaves_the_encoder_alone(self, quick, taught):
        settings = {**quick, "method": "mlm", "teacher": None, "student": quick["teacher"], "trained": "head"}
        record = pretraining.run(pretraining.configure(**settings))
        made, given = (
            AutoModelForMaskedLM.from_pretrained(path) for path in (record.folder / "student", quick["teacher"])
        )
        for ours, theirs in zip(made.bert.parameters(), given.bert.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert not torch.equal(
            made.cls.predictions.transform.dense.weight, given.cls.predictions.transform.dense.weight
        )

    def test_evaluation_is_always_of_the_same_masks_and_draws_and_moves_nothing(self, quick):
        config = pretraining.configure(**quick)
        accelerator, tokenizer = pretraining.accelerator_for("cpu"), models.load_tokenizer(config.teacher)
        masking = corpus.masking(tokenizer, config.mask_rate, 5)
        who = pretraining.networks(config, tokenizer, masking, accelerator)
        student = who.cast.student.module
        _, held_out = pretraining.load_corpus(config, tokenizer)
        measure = pretraining.evaluation(config, who, held_out, tokenizer)
        before, state = models.trainable(student), torch.get_rng_state()
        before = {name: tensor.clone() for name, tensor in before.items()}
        student.train()
        first = measure()
        torch.rand(3)
        torch.set_rng_state(state)
        assert measure() == first and student.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[n], p) for n, p in student.named_parameters())

    def test_the_last_blocks_are_held_out(self, quick):
        config = pretraining.configure(**quick)
        tokenizer = models.load_tokenizer(config.teacher)
        text, held_out = pretraining.load_corpus(config, tokenizer)
        whole = corpus.load(config.corpus, tokenizer, max_length=32).encoded
        assert torch.equal(torch.cat([text.encoded.input_ids, held_out.input_ids]), whole.input_ids)
        assert torch.equal(torch.cat([text.encoded.lengths, held_out.lengths]), whole.lengths)
        assert held_out.offsets[0] == 0 and held_out.rows.tolist() == [57, 58, 59]


class TestErrorsBeforeAnyWork:
    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch):
        monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("trained"))

    @staticmethod
    def run(quick, tmp_path, **changes):
        return pretraining.run(pretraining.configure(**{**quick, "output_dir": str(tmp_path), **changes}))

    @pytest.fixture
    def before_reading(self, monkeypatch):
        monkeypatch.setattr(corpus, "load", lambda *_, **__: pytest.fail("read the corpus"))

    def test_another_number_of_words(self, quick, tmp_path, before_reading):
        network = AutoModelForMaskedLM.from_pretrained(quick["teacher"])
        network.resize_token_embeddings(network.config.vocab_size + 8)
        engine.save_pretrained(network, AutoTokenizer.from_pretrained(quick["teacher"]), tmp_path / "wide")
        with pytest.raises(ValueError, match=r"the student has \d+ word pieces, the teacher \d+.*one vocabulary"):
            self.run(quick, tmp_path, student=str(tmp_path / "wide"))

    @pytest.mark.parametrize("method", [method for method in ON_TEXT if method != "mlm"])
    def test_a_head_that_was_never_trained_is_asked_for_words_only_by_name(
        self, quick, tmp_path, before_reading, method, monkeypatch
    ):
        """What is inside an encoder may be shown as it is."""
        network = AutoModelForMaskedLM.from_pretrained(quick["teacher"])
        engine.save_pretrained(
            network.base_model, AutoTokenizer.from_pretrained(quick["teacher"]), tmp_path / "encoder"
        )
        settings = {"method": method, "teacher": str(tmp_path / "encoder")}
        predicting = method in ("soft_labels", "distilbert", "untutored", "tutor")
        if predicting:
            with pytest.raises(ConfigurationError, match=rf"encoder' comes without a trained .* and {method} asks it"):
                self.run(quick, tmp_path, **settings)
            settings["untrained_teacher"] = True
        monkeypatch.setattr(corpus, "load", lambda *_, **__: (_ for _ in ()).throw(EOFError("came to the corpus")))
        with pytest.raises(EOFError):
            self.run(quick, tmp_path, **settings)

    def test_as_many_words_but_others(self, quick, tmp_path, before_reading):
        shutil.copytree(quick["teacher"], tmp_path / "other")
        path = tmp_path / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace('"good"', '"gold"'))
        assert '"gold"' in path.read_text()
        with pytest.raises(ValueError, match="have different tokenizers: distillation on text needs one vocabulary"):
            self.run(quick, tmp_path, student=str(tmp_path / "other"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "tutor", "student": "tiny-3x32"}, "the student has 3 layers, the teacher 2"),
            ({"method": "tinybert", "student": "tiny-3x32"}, "the student has 3 layers, the teacher 2"),
            ({"method": "minilm", "student": "tiny-1x32h4"}, "has 4 heads, the teacher 2.*take minilm_v2"),
            ({"method": "tutor", "student": "tiny-1x32h4", "attention": True}, "4 heads, the teacher 2.*attention"),
            ({"method": "minilm_v2", "relation_heads": 5}, "relation_heads is 5, which does not divide the student's"),
            ({"method": "soft_labels", "max_length": 256}, "max_length is 256, but .* reads 128 word pieces at most"),
            ({"method": "mlm", "teacher": None, "max_length": 256}, "reads 128 word pieces at most"),
        ],
    )
    def test_networks_that_do_not_fit(self, quick, tmp_path, before_reading, changes, message):
        with pytest.raises(ValueError, match=message):
            self.run(quick, tmp_path, **changes)

    def test_where_it_does_not_matter_heads_and_depths_may_differ(self, quick, tmp_path):
        for changes in (
            {"method": "tutor", "student": "tiny-1x32h4"},
            {"method": "soft_labels", "student": "tiny-3x32h4"},
            {"method": "minilm_v2", "student": "tiny-3x32h4"},
        ):
            with pytest.raises(pytest.fail.Exception, match="trained"):
                self.run(quick, tmp_path, **changes)

    def test_an_empty_corpus(self, quick, tmp_path):
        (tmp_path / "empty.txt").write_text("\n \n")
        with pytest.raises(ValueError, match=r"empty\.txt has no usable line"):
            self.run(quick, tmp_path, corpus=str(tmp_path / "empty.txt"))

    def test_a_corpus_that_is_too_small_to_hold_any_out(self, quick, tmp_path):
        with pytest.raises(ValueError, match=r"has 19 blocks, too few to hold any out: .* validation_split"):
            self.run(quick, tmp_path, max_lines=19)

    def test_a_missing_file_and_a_missing_network(self, quick, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            self.run(quick, tmp_path, corpus=str(tmp_path / "absent.txt"))
        with pytest.raises(OSError, match="cannot load"):
            self.run(quick, tmp_path, teacher=str(tmp_path / "absent"))

    @pytest.mark.usefixtures("unchecked")  # a stand-in for the record
    def test_a_run_that_another_process_computes_is_waited_for(self, quick, tmp_path, monkeypatch):
        config = pretraining.configure(**{**quick, "output_dir": str(tmp_path)})
        monkeypatch.setattr(engine, "_compute", lambda *_: pytest.fail("computed a second time"))
        monkeypatch.setattr(engine, "read_record", lambda folder: folder)
        with ThreadPoolExecutor(1) as pool:
            with folders.alone_in(config.folder):
                waiting = pool.submit(pretraining.run, config)
                assert not wait([waiting], timeout=0.5).done
                (config.folder / records.RECORD).touch()
            assert waiting.result(30) == config.folder

    def test_a_folder_that_cannot_be_written(self, quick, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match=r"cannot write to .*choose another output_dir"):
            self.run(quick, tmp_path / "file")


def test_out_of_time_it_stops_with_a_checkpoint_and_ends_the_same(quick, tmp_path):
    """A step a call: max_seconds are over after the first."""
    ends = {}
    for name, limit in (("whole", None), ("pieces", 1e-9)):
        settings = {**quick, "output_dir": str(tmp_path / name), "order": "in turns", "baseline": "running mean"}
        config = pretraining.configure(**settings, max_seconds=limit)
        stopped = []
        for _ in itertools.count():
            try:
                record = pretraining.run(config)
                break
            except TrainingInterruptedError as interruption:
                stopped.append(str(interruption))
                assert not (config.folder / records.RECORD).exists()
        ends[name] = (
            (record.folder / "student" / "model.safetensors").read_bytes(),
            tutor_of(record),
        )
        pd.testing.assert_frame_equal(
            record.history_frame, ends.setdefault("history", record.history_frame), check_exact=True
        )
        if limit:
            assert len(stopped) == 2 and "after step 1 of 3; run the same command again" in stopped[0]
    assert ends["whole"] == ends["pieces"]


def test_a_changed_text_is_not_taken_for_the_old_one(quick, text, tmp_path):
    own = tmp_path / "own.txt"
    shutil.copy(text, own)
    config = pretraining.configure(**{**quick, "output_dir": str(tmp_path), "corpus": str(own)}, max_seconds=1e-9)
    with pytest.raises(TrainingInterruptedError):
        pretraining.run(config)
    before = config.folder
    own.write_bytes(own.read_bytes()[:-40] + b"\nthe film is good .\n")
    assert config.folder != before and not config.folder.exists()
    with pytest.raises(TrainingInterruptedError, match="after step 1 "):
        pretraining.run(config)
