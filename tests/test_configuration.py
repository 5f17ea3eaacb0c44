"""Configurations of runs on a task: defaults, names, and everything that is refused."""

import json
import math
import re

import pytest

from kdlib.configuration import READ_BY, TEACHER, RunConfig, configure, readable, teachers_config
from kdlib.methods import METHODS
from kdlib.methods.base import NAMED_ALWAYS, TEACHERS_OWN, TRAINING
from kdlib.settings import ConfigurationError, describe, names

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
WORDS = {field: words for kind in (RunConfig, *METHODS.values()) for field, words, *_ in describe(kind)}
NUMBERS = [name for name in (*names(RunConfig), *READ_BY) if {"int", "float"} & {*WORDS.get(name, "").split(" or ")}]
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
    "anchors": 2,
    "assistants": "tiny-2x64",
    "first_stage": 0.25,
    "max_temperature": 5,
    "replacing_rate": 0.5,
    "replaced_after": 0.75,
    "replacement": "constant",
    "attention": False,
    "adapter_size": 8,
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
    "auxiliary": False,
    "teacher_batch_size": 8,
    "teacher_micro_batches": 2,
    "teacher_weight_decay": 0.2,
    "teacher_warmup_ratio": 0.3,
    "teacher_max_grad_norm": 0.5,
    "teacher_evaluate_every": 7,
    "teacher": "tiny-1x64",
}
"""Further values that no default has."""
WEIGHTED = {"influence": "weighted", "influence_weight": 1.0, "influence_share": None, "feedback_every": 1}
LGTM = {
    name: value for name, value in {**ONLINE, **PILOT}.items() if name not in ("first", "pilot_update", "inner_steps")
}


class TestConfigure:
    def test_defaults_are_complete(self):
        config = configure()
        assert (config.source, config.task, config.method) == ("miniglue", "mini-mnli", "kd")
        left = {name for name, value in vars(config).items() if value is None}
        limits = {"max_train", "max_evaluation", "max_steps", "evaluate_every", "checkpoint_every", "max_seconds"}
        assert left == limits | {"text_columns", "student_layers", "metrics", "max_grad_norm", "log_with"}
        left = {name for name, value in vars(config.settings).items() if value is None}
        assert left == {"pkd_layers", "pkd_normalisation", "teacher_max_grad_norm", "teacher_evaluate_every"}
        assert type(config.settings) is METHODS["kd"]

    @pytest.mark.parametrize("method", METHODS)
    def test_the_flat_configuration_has_every_field_of_every_method_and_gives_the_configuration_back(self, method):
        """As it is written to a record, and read from there."""
        config = configure(method=method)
        assert set(config.flat) == {*names(RunConfig), *READ_BY} - {"settings"}
        unread = {name for name, readers in READ_BY.items() if method not in readers}
        assert {name: config.flat[name] for name in unread} == {n: 0 if n == "teacher_seed" else None for n in unread}
        again = configure(**json.loads(json.dumps(config.flat)))
        assert again == config and again.run_id == config.run_id

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
        config = configure(**networks)
        assert (config.settings.teacher_learning_rate, config.learning_rate) == (teacher, student)
        assert teachers_config(config).learning_rate == teacher
        given = configure(**networks, teacher_learning_rate=7e-4, learning_rate=8e-4)
        assert (given.settings.teacher_learning_rate, given.learning_rate) == (7e-4, 8e-4)

    def test_all_problems_in_one_message_with_the_nearest_names(self):
        with pytest.raises(ConfigurationError) as caught:
            configure(
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

    def test_a_folder_may_be_called_as_it_likes(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigurationError, match="'tiny-student' is not of the form"):
            configure(student="tiny-student")
        (tmp_path / "tiny-student").mkdir()
        assert configure(student="tiny-student").student == "tiny-student"

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"task": "mini-stsb", "objective": "kl"}, "regression task, where a softmax has no meaning"),
            ({"teacher": "tiny4x128"}, "not of the form 'tiny-<layers>x<hidden>'"),
            ({"teacher": "tiny-1x16"}, "'tiny-1x16': a tiny BERT needs .* a width that is a multiple of 32"),
            ({"student": "tiny-0x64"}, "'tiny-0x64': a tiny BERT needs at least one layer"),
            ({"student": "tiny-2x64h5"}, "'tiny-2x64h5': 5 heads cannot share 64 units"),
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
            configure(**parameters)
        assert str(caught.value).count("\n  - ") == 1

    @pytest.mark.parametrize("name", ["../../evil", "/etc/x", "..", "a\nb", "", "x" * 200, "a/b"])
    def test_a_task_whose_name_is_no_file_name_is_refused(self, name):
        with pytest.raises(ConfigurationError, match=r"files are named\s+after it") as caught:
            configure(task=name, text_columns="text")
        assert str(caught.value).count("\n  - ") == 1

    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("value", [10**40, -(10**40), 1e40, math.inf, -math.inf, math.nan])
    def test_every_number_has_a_limit(self, name, value):
        with pytest.raises(ConfigurationError, match=f"{name} is "):
            configure(**{"method": READ_BY.get(name, ["kd"])[0], name: value})

    @pytest.mark.parametrize("name", [*names(RunConfig), *READ_BY])
    def test_whatever_is_given_the_answer_is_a_configuration_or_says_what_is_wrong_with_it(self, name):
        method = READ_BY.get(name, ["kd"])[0]
        numbers = True, -1, 0, 0.5, 1, math.nan, 10**400, 1e308
        for value in (*numbers, "", " ", "\0", "x", b"x", [], {"a": 1}, (), object()):
            try:
                configure(**{"method": method, name: value})
            except ConfigurationError as error:
                assert name.removeprefix("text_").rstrip("s") in str(error)

    def test_an_integer_is_a_float_and_equal_configurations_share_an_identity(self):
        one, other = configure(temperature=2), configure(temperature=2.0, output_dir="x", resume=False)
        assert one.identity == other.identity and one.run_id == other.run_id
        assert one.run_id != configure(temperature=3).run_id

    def test_what_fine_tuning_does_not_read_is_refused_and_can_be_left_out(self):
        given = {"alpha": 0.1, "temperature": 9, "teacher": "tiny-1x32", "teacher_seed": 4, "student": "tiny-2x32"}
        with pytest.raises(ConfigurationError) as caught:
            configure(method="fine_tune", **given)
        assert all(name in str(caught.value) for name in given)
        left = readable(given, "fine_tune")
        assert configure(method="fine_tune", **left) == configure(method="fine_tune", student="tiny-2x32")

    def test_regression_distils_logits(self):
        assert configure(task="mini-stsb").settings.objective == "logit_mse"

    def test_the_teacher_is_shared_by_runs_that_differ_in_the_student_only(self):
        one = teachers_config(configure(seed=1, temperature=4, alpha=0.2))
        other = teachers_config(configure(seed=2, student="tiny-1x64", learning_rate=1e-4))
        assert one.run_id == other.run_id and one.method == "fine_tune" and one.student == TEACHER
        assert teachers_config(configure(teacher_seed=1)).run_id != one.run_id

    @pytest.mark.parametrize("name", TRAINING)
    def test_the_teacher_trains_by_its_own_settings_and_not_by_its_students(self, name):
        """Catches a teacher that is fine-tuned again for a student that is evaluated, cut or clipped differently."""
        value = {**OTHERS, **CHANGED}[f"teacher_{name}"]
        plain = configure()
        assert value not in (getattr(plain, name), getattr(plain.settings, f"teacher_{name}"))
        student, teacher = configure(**{name: value}), configure(**{f"teacher_{name}": value})
        assert len({plain.run_id, student.run_id, teacher.run_id}) == 3
        assert teachers_config(student) == teachers_config(plain)
        assert teachers_config(student).run_id == teachers_config(plain).run_id
        assert teachers_config(teacher).run_id != teachers_config(plain).run_id
        assert getattr(teachers_config(teacher), name) == value and getattr(teacher, name) == getattr(plain, name)

    @pytest.mark.parametrize("name", ["task", "max_train", "max_evaluation", "max_steps", "max_length", "precision"])
    def test_what_both_runs_share_is_the_students(self, name):
        values = {"task": "mini-sst2", "max_length": 64, "precision": "bf16"}
        config = configure(**{name: values.get(name, 50)})
        assert getattr(teachers_config(config), name) == getattr(config, name) == values.get(name, 50)
        assert teachers_config(config).run_id != teachers_config(configure()).run_id

    def test_the_teachers_settings_are_silent_where_they_are_the_students_or_nobody_is_fine_tuned(self):
        """Runs keep the names that they had when a teacher was trained as its student is."""
        new = [name for name in TEACHERS_OWN if name not in NAMED_ALWAYS]
        values = {name: CHANGED[name] for name in new}
        assert not set(new) & set(configure().identity)
        follow = {name.removeprefix("teacher_"): value for name, value in values.items()}
        assert not set(new) & set(configure(**values, **follow).identity)
        assert set(new) <= set(configure(**follow).identity)  # here they are not the student's
        for taken in ({"teacher": "book-teacher"}, {"method": "prokt"}):
            assert not set(new) & set(configure(**taken, **follow).identity)
            for name, value in values.items():
                with pytest.raises(ConfigurationError, match=f"{name} is .*, but teacher_epochs is 0: the teacher is"):
                    configure(**taken, **{name: value})
        assert (
            configure(method="prokt", teacher_epochs=1, **values).run_id
            != configure(method="prokt", teacher_epochs=1).run_id
        )

    def test_no_teacher_to_fine_tune(self):
        for parameters in ({"method": "fine_tune"}, {"method": "prokt"}, {"teacher": "book-teacher"}):
            assert teachers_config(configure(**parameters)) is None


class TestMethods:
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
        config = configure(method=method).flat
        expected = {**IMITATION, **expected}
        assert {name: config[name] for name in expected} == pytest.approx(expected)
        elsewhere = {"teacher", *TEACHERS_OWN}
        assert {name for name in READ_BY if config[name] is not None} - elsewhere <= expected.keys()

    def test_defaults_follow_other_fields(self):
        own = configure(method="prokt", alpha=0.2, objective="reverse_kl", teacher_epochs=2, batch_size=16).settings
        assert (own.teacher_alpha, own.teacher_objective, own.zero_classifiers) == (0.2, "reverse_kl", False)
        assert not configure(method="prokt", teacher="book-teacher").settings.zero_classifiers
        own = configure(method="metadistil", teacher_learning_rate=1e-2, batch_size=16, pkd_weight=0.5).settings
        assert (own.teaching_rate, own.feedback_batch_size) == (pytest.approx(1e-3), 16)
        assert (own.pkd_layers, own.pkd_normalisation) == ("skip", "sum")
        for method, fraction in (("lgtm", 0.1), ("prokt", 0.0)):
            config = configure(method=method, objective="dist")
            assert (config.settings.zero_classifiers, config.settings.teacher_objective) == (False, "dist")
            assert config.feedback_fraction == fraction
        own = configure(method="lgtm", influence="released").settings
        assert (own.influence_weight, own.pilot_rule) == ("teacher_rate", "adamw")
        own = configure(method="lgtm", influence="meta", influence_share=0.3).settings
        assert (own.influence_weight, own.influence_share, own.pilot_rule) == (None, 0.3, "sgd")
        config = configure(method="lgtm", feedback_from="validation")
        assert (config.settings.feedback_from, config.feedback_fraction) == ("validation", 0.0)
        own = configure(task="mini-stsb", method="prokt").settings
        assert (own.objective, own.teacher_objective) == ("logit_mse", "logit_mse")

    @pytest.mark.parametrize("method", METHODS)
    def test_fields_of_other_methods_are_refused_in_one_message(self, method):
        """Catches a field that leaks into another method's run id."""
        used = readable(OTHERS, method)
        config = configure(method=method, **used)
        assert all(getattr(config.settings, name) == value for name, value in used.items())
        counts = {"fine_tune": 1, "kd": 3, "prokt": 8, "dml": 8, "metadistil": 12, "ikd": 11, "lgtm": 17}
        counts |= {"pkd": 3, "dist": 3, "skd": 3, "takd": 4, "rco": 4, "pesf": 7}
        counts |= {"annealing": 2, "theseus": 3, "tinybert_task": 2}
        assert len(used) == counts[method]
        with pytest.raises(ConfigurationError) as caught:
            configure(method=method, **OTHERS)
        said = re.search(rf"method '{method}' does not read (.*): leave them out", str(caught.value))[1]
        assert {part.split(" = ")[0] for part in said.split("; ")} == OTHERS.keys() - used.keys()

    @pytest.mark.parametrize("name", READ_BY)
    @pytest.mark.parametrize("method", METHODS)
    def test_a_field_is_read_or_refused_never_ignored(self, method, name):
        """A field that a method reads changes its run; any other is an error."""
        plain = {"method": method, **({"pkd_weight": 0.5} if name in ("pkd_layers", "pkd_normalisation") else {})}
        plain |= {"exam": "train"} if (method, name) == ("ikd", "feedback_batch_size") else {}
        plain |= {"teacher_epochs": 1} if name in TEACHERS_OWN and name != "teacher_epochs" else {}
        value = {**OTHERS, **CHANGED}[name]
        if (method, name) in (("dist", "objective"), ("skd", "objective")):
            with pytest.raises(ConfigurationError, match="objective is 'reverse_kl'; expected one of"):
                configure(**{**plain, name: value})
        elif method in READ_BY[name]:
            assert configure(**{**plain, name: value}).run_id != configure(**plain).run_id
        else:
            with pytest.raises(ConfigurationError, match=rf"does not read .*{name} = "):
                configure(**{**plain, name: value})

    def test_runs_without_a_learning_teacher_keep_their_names(self):
        """Their folders, and those of the teachers that are shared, were named before these fields were there."""
        names = [configure(method=method).run_id for method in ("kd", "fine_tune")]
        assert names == ["mini-mnli-kd-seed0-1e586b23", "mini-mnli-fine_tune-seed0-e2d16116"]
        assert teachers_config(configure(method="metadistil", feedback_fraction=0.0001)).method == "fine_tune"
        for method, more in (("kd", {"alpha", "temperature", "objective"}), ("fine_tune", set())):
            given = {name for name, value in configure(method=method).identity.items() if value is not None}
            assert given & {*READ_BY} - {"teacher", *NAMED_ALWAYS} == more

    def test_teachers_that_learn_keep_their_names_too(self):
        """Those of MetaDistil and online distillation were there before IKD."""
        names = [configure(method=method).run_id for method in ("prokt", "dml", "metadistil")]
        assert names == OLD_NAMES

    def test_an_exam_has_data_and_a_batch_size_where_it_is_not_the_course(self):
        for exam, expected in (("course", (0.0, None)), ("train", (0.0, 16)), ("feedback", (0.1, 16))):
            config = configure(method="ikd", exam=exam, batch_size=16)
            assert (config.feedback_fraction, config.settings.feedback_batch_size) == expected

    @pytest.mark.parametrize("method", ["fine_tune", "kd", "ikd"])
    def test_without_labels_of_the_course_nobody_asks_for_any(self, method):
        config = configure(method=method, labelled_course=False)
        assert (config.feedback_fraction, config.settings.labelled_course) == (0.1, False)
        assert config.flat["alpha"] == (None if method == "fine_tune" else 0.0)
        assert config.flat["exam"] == ("feedback" if method == "ikd" else None)
        if method != "fine_tune":
            assert teachers_config(config).settings.labelled_course is False
        assert configure(method=method, labelled_course=True) == configure(method=method)

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
            ({"method": "ikd", "meta_weight": 2}, "meta_weight is 2; expected a number between 0 and 1"),
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
            ({"method": "lgtm", "influence_weight": -1}, "influence_weight is -1; expected a number ≥ 0"),
            ({"method": "lgtm", "influence_share": -1}, "influence_share is -1; expected 0 or more"),
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
                "pilot_learning_rate is 0; expected a positive number",
            ),
            ({"method": "prokt", "teaching_rate": float("nan")}, "teaching_rate is nan"),
            ({"pkd_weight": -1}, "pkd_weight is -1; expected 0 or more"),
            ({"method": "prokt", "teacher_alpha": 2}, "teacher_alpha is 2; expected a number between 0 and 1"),
            ({"pilot_updates": True}, "did you mean 'pilot_update'"),
            ({"task": "mini-stsb", "method": "prokt", "teacher_objective": "kl"}, "teacher_objective is 'kl', but"),
        ],
    )
    def test_single_problems(self, parameters, message):
        with pytest.raises(ConfigurationError, match=message) as caught:
            configure(**parameters)
        assert str(caught.value).count("\n  - ") == 1


def test_a_table_puts_records_together_whose_teachers_were_trained_as_ever():
    """Records from before a teacher had a batch size of its own lack the field; None is what they are taken for."""
    flat = configure(seed=1).flat
    assert {flat[name] for name in TEACHERS_OWN if name not in NAMED_ALWAYS} == {None}
    assert configure(**configure(teacher_batch_size=8).flat).settings.teacher_batch_size == 8
