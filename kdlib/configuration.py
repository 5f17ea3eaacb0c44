"""What a run on a task is: everything it depends on, checked before any work is done, and its name.

    config = configure(task="mini-sst2", method="lgtm", temperature=2, influence="meta")

Outside, a configuration is flat.  Inside, a `RunConfig` has the fields of all runs, and `settings`, an object of the
method's own class (`kdlib.methods`), the rest.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from kdlib import glue, miniglue, models
from kdlib.engine import name_of
from kdlib.learner import BATCH_SIZE, WARMUP_RATIO, WEIGHT_DECAY
from kdlib.methods import METHODS
from kdlib.methods.base import TRAINING, Taught, suitable_rates
from kdlib.records import NOT_IDENTITY
from kdlib.settings import (
    Layers,
    Name,
    Positive,
    Rate,
    Rows,
    Seed,
    Share,
    Size,
    Steps,
    Weight,
    among,
    by_rule,
    checked,
    names,
    read_by,
    refuse,
    said,
    settings,
    unknown,
    unread,
)
from kdlib.trackers import Tracker

TEACHER, STUDENT_NETWORK = "tiny-2x64", "tiny-2x32"
"""Who learns from whom on MiniGLUE unless the configuration says otherwise."""


@settings
class RunConfig:
    """What all runs on a task depend on.  Make one with `configure`, which checks it and fills in what is None."""

    source: Name = "miniglue"
    """"miniglue" (embedded), a hub id such as "nyu-mll/glue", or a local folder of the same layout"""
    task: str = "mini-mnli"
    """the task's name; for a data set of your own any name, together with text_columns"""
    text_columns: str | None = None
    """for a data set of your own: its text column, or two joined by a comma"""
    label_column: str = "label"
    """for a data set of your own: its label column"""
    regression: bool = False
    """for a data set of your own: whether its labels are scores"""
    metrics: str | None = None
    """for a data set of your own: what is measured, joined by commas, the first one chooses the best checkpoint:
    "accuracy", "f1", "micro_f1", "macro_f1", "matthews_correlation", of scores "pearson", "spearmanr"; None: accuracy,
    of scores both"""
    method: Annotated[str, among(METHODS)] = "kd"
    """"fine_tune" (the student alone); those with a fixed teacher, "kd", "pkd", "dist", "skd", "takd", "rco",
    "annealing", "theseus", "tinybert_task"; those whose teacher learns, "pesf", "prokt", "dml", "metadistil", "ikd",
    "lgtm\""""
    teacher: Name | None = None
    """"tiny-<layers>x<hidden>", "book-teacher", "minilm", a hub id, a folder, …, see `models`; None: tiny-2x64"""
    student: Name | None = None
    """likewise; None: tiny-2x32, unless student_layers is given"""
    student_layers: Layers | None = None
    """cut the student's checkpoint, or without a student the teacher's, after so many layers"""
    epochs: Steps = by_rule()
    """passes over the training set; None: 8 for tiny networks, 3 for pretrained ones"""
    batch_size: Size = BATCH_SIZE
    """samples of an optimiser step"""
    micro_batches: Size = 1
    """cut each batch into so many pieces to save memory"""
    learning_rate: Rate = by_rule()
    """None: 2e-3 for tiny students, 2e-4 for minilm, 5e-5 for other pretrained ones"""
    weight_decay: Weight = WEIGHT_DECAY
    """of AdamW, on matrices only"""
    warmup_ratio: Share = WARMUP_RATIO
    """share of the steps in which the learning rate rises; it falls linearly afterwards"""
    max_grad_norm: Positive | None = None
    """longer gradients are scaled down; None: 1"""
    max_length: Size = 128
    """word pieces kept of an example"""
    feedback_fraction: Share | None = None
    """share of the training set carved out as feedback data, which nobody trains on; None: 0, 0.1 where it is needed"""
    seed: Seed = 0
    """of the student: initial weights, order of the data, dropout"""
    max_train: Rows | None = None
    """train on a random subset of so many samples"""
    max_evaluation: Rows | None = None
    """evaluate on a random subset of so many samples of each evaluation split"""
    max_steps: Steps | None = None
    """stop each training, the teacher's too, after so many steps"""
    evaluate_every: Steps | None = None
    """steps between evaluations; None: an epoch"""
    checkpoint_every: Steps | None = None
    """steps between checkpoints; None: at each evaluation"""
    max_seconds: Positive | None = None
    """stop after so long with a checkpoint; the same command goes on from it"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """"fp32", "bf16" or "fp16" (GPU only)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto", "cpu" or "cuda\""""
    predict_test: bool = True
    """also write predictions for test splits whose labels are hidden, for a submission"""
    output_dir: Name = "_runs"
    """the folder that holds all runs"""
    resume: bool = True
    """go on with an interrupted run and reuse a finished one; False: start afresh, the teacher included"""
    log_with: Tracker | None = None
    """who follows the history while it grows, on this machine: "tensorboard", "trackio" or "wandb\""""
    settings: Any = None
    """what the method alone reads, an object of its class in `METHODS`"""

    @property
    def glue_task(self) -> glue.Task:
        """The task's description, the generic one for a data set of your own."""
        if self.text_columns is None:
            return glue.task_for(self.task)
        classes = () if self.regression else None
        chosen = None if self.metrics is None else _listed(self.metrics)
        return glue.generic_task(
            self.task, _listed(self.text_columns), classes, chosen, test_splits=None, label_column=self.label_column
        )

    @property
    def reader(self) -> str:
        """The network whose tokenizer cuts the texts."""
        name = self.teacher or self.student
        assert name is not None
        return name

    @property
    def flat(self) -> dict[str, Any]:
        """All fields of all methods as one dict, None for those that this method does not read; see `configure`."""
        own = {name: value for name, value in vars(self).items() if name != "settings"}
        return {**own, **dict.fromkeys(READ_BY), "teacher_seed": 0, **self.settings.flat}

    @property
    def identity(self) -> dict[str, Any]:
        """The parameters that decide the result, as they were given; `run_id` has what lies outside the package."""
        own = {name: value for name, value in vars(self).items() if name not in (*NOT_IDENTITY, "settings")}
        later = {name for name in _LATER if own[name] is None}
        # Fields that the first records had for all methods are there for all.
        found = {**own, **dict.fromkeys(_FIRST), "teacher_seed": 0, **self.settings.identity}
        if isinstance(self.settings, Taught) and self.settings.teacher_epochs:
            theirs = {name: getattr(self.settings, f"teacher_{name}") for name in TRAINING}
            found |= {f"teacher_{n}": v for n, v in theirs.items() if n not in _FIRST and v != getattr(self, n)}
        return {name: value for name, value in found.items() if name not in later}

    @property
    def asked_id(self) -> str:
        """The name of this run by its parameters alone; nothing is read."""
        return name_of(f"{self.task}-{self.method}-seed{self.seed}", self.identity)

    @property
    def run_id(self) -> str:
        """A readable, unique name for what this run computes.

        Data and networks of the book count by their names, all others by their content (see `contents`): corrected
        labels or other weights under the same path are another run, the same data under another path are not.

        Raises what `load_data` and `models.content` raise.
        """
        return name_of(f"{self.task}-{self.method}-seed{self.seed}", {**self.identity, **self.contents})

    @property
    def contents(self) -> dict[str, str]:
        """What data and networks from outside the package are, by content, in place of their paths; {} for the book's.

        Data have a fingerprint of the rows that the run reads; a folder with a network one of its weights,
        configuration and tokenizer; a network from the hub its id and commit.
        """
        found = {} if self.source == "miniglue" else {"source": _fingerprint(*_what_to_load(self))}
        for who in ("teacher", "student"):
            name = getattr(self, who)
            if name is not None and (content := models.content(name)) is not None:
                found[who] = content
        if assistants := self.settings.networks:
            contents = {name: None if name.isdecimal() else models.content(name) for name in assistants}
            if any(contents.values()):
                found["assistants"] = ",".join(content or name for name, content in contents.items())
        return found

    @property
    def folder(self) -> Path:
        """Where this run keeps its record, checkpoint, student and predictions."""
        return Path(self.output_dir).expanduser() / self.run_id


_LATER = ("metrics", "max_grad_norm")
"""Fields that came after the first records were made: no part of a run's identity where they are None."""
_FIRST = ("alpha", "temperature", "objective", "teacher_epochs", "teacher_learning_rate")
READ_BY = read_by(RunConfig, METHODS)
"""The methods that read a field, for those that not all of them read."""


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def configure(**parameters: Any) -> RunConfig:
    """Check `parameters`, fill in the defaults that depend on others, and return the configuration.

    What the method does not read is refused (`readable` leaves it out), so that two configurations that compute the
    same are equal and none means something else than it says.  None says nothing.

    Raises ConfigurationError with one message that lists all problems and, for names, the nearest valid ones.
    """
    problems = unknown(parameters, RunConfig, METHODS)
    given, wrong = checked(RunConfig, said(parameters, RunConfig))
    problems += wrong
    assert given is not None
    try:
        given.glue_task  # noqa: B018  (its checks)
        run = _completed(given)
    except ValueError as error:
        problems.append(str(error))
        run = _completed(dataclasses.replace(given, task="mini-mnli", text_columns=None))  # to look for more problems
    kind = METHODS[run.method]
    told = {
        name: value for name, value in parameters.items() if name in READ_BY and value not in (None, _UNSAID.get(name))
    }
    own, wrong = checked(kind, {**kind.defaults(run), **said(told, kind)})
    problems += wrong + unread(told, run.method, READ_BY) + _data_problems(given) + _network_problems(given)
    if own is not None:
        problems += own.problems(run)
    refuse(problems)
    assert own is not None
    own = dataclasses.replace(own, **{n: v for n, v in own.completed(run).items() if getattr(own, n) is None})
    fraction = 0.1 if own.carves else 0.0
    fraction = fraction if run.feedback_fraction is None else run.feedback_fraction
    return dataclasses.replace(run, settings=own, feedback_fraction=fraction)


_UNSAID = {"teacher_seed": 0}
"""What the first records have for a field that their method does not read."""


def readable(parameters: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Those of the parameters that `method` reads: for a grid whose methods share settings."""
    alone = method == "fine_tune" and parameters.get("student") is not None
    read = {name: value for name, value in parameters.items() if method in READ_BY.get(name, (method,))}
    return {name: value for name, value in read.items() if not (alone and name == "teacher")}


def _completed(given: RunConfig) -> RunConfig:
    """Fill in what depends on the networks."""
    teacher, student = given.teacher or TEACHER, given.student
    if student is None and given.student_layers is None:
        student = STUDENT_NETWORK
    epochs = 8 if models.is_tiny(student or teacher) else 3
    alone = METHODS[given.method].teaches == "nobody"
    return dataclasses.replace(
        given,
        teacher=None if alone and student is not None else teacher,
        student=student,
        epochs=given.epochs or epochs,
        learning_rate=given.learning_rate or suitable_rates(student or teacher)[1],
    )


def _data_problems(given: RunConfig) -> list[str]:
    """What describes data of one's own without any, and data that need other networks than those of the book."""
    problems = []
    if given.text_columns is None:
        for field in dataclasses.fields(RunConfig):
            value = getattr(given, field.name)
            if field.name in ("label_column", "regression", "metrics") and value != field.default:
                problems.append(f"{field.name} is {value!r}, which describes data of your own: give text_columns, too")
    if given.source == "miniglue":
        return problems
    if models.is_small(given.teacher or TEACHER) and METHODS[given.method].teaches != "nobody":
        problems.append(
            f"source {given.source!r} needs a pretrained teacher: tiny networks read MiniGLUE's small vocabulary. "
            "Give teacher 'minilm', a hub id or a folder"
        )
    if given.student is None and given.student_layers is None:
        problems.append(f"source {given.source!r} needs a student: give student or student_layers")
    return problems


def _network_problems(given: RunConfig) -> list[str]:
    """What is wrong with the names of the networks."""
    problems = []
    if METHODS[given.method].teaches == "nobody" and given.teacher is not None and given.student is not None:
        problems.append(
            f"teacher is {given.teacher!r}, but method {given.method!r} trains the student {given.student!r} alone: "
            "leave it out"
        )
    return problems + models.name_problems(given.teacher, given.student)


def teachers_config(config: RunConfig) -> RunConfig | None:
    """The run that makes the teacher of `config`, the same for every run that can share it; None if it is there."""
    own = config.settings.teachers_run(config) if isinstance(config.settings, Taught) else None
    if own is None:
        return None
    both = {name: getattr(config, name) for name in names(RunConfig) if name not in (*TRAINING, "settings")}
    labels = {"labelled_course": getattr(config.settings, "labelled_course", True)}
    own = {"teacher": None, "student_layers": None, **labels, **own}
    return configure(**{**both, **{n: v for n, v in own.items() if own["method"] in READ_BY.get(n, (own["method"],))}})


def load_data(config: RunConfig) -> glue.TaskData:
    """The run's data, checked, with the feedback split carved out; read again only if the files have changed."""
    return _loaded(*_what_to_load(config))


def _what_to_load(config: RunConfig) -> tuple[Any, ...]:
    what = (config.source, config.glue_task, config.max_train, config.max_evaluation, config.feedback_fraction)
    return *what, config.predict_test, _signature(config.source)


@functools.lru_cache(maxsize=2)  # a teacher and its student share the data, one run after the other
def _loaded(
    source: str,
    task: glue.Task,
    max_train: int | None,
    max_evaluation: int | None,
    feedback_fraction: float,
    want_test: bool,
    signature: tuple[Any, ...],
) -> glue.TaskData:
    return glue.load(
        source,
        task,
        max_train=max_train,
        max_evaluation=max_evaluation,
        feedback_fraction=feedback_fraction,
        seed=0,  # the split belongs to the task, not to the run: all seeds and methods see the same rows
        want_test=want_test,
    )


@functools.lru_cache(maxsize=16)
def _fingerprint(*what: Any) -> str:
    return f"sha256:{glue.fingerprint(_loaded(*what))}"


def _signature(source: str) -> tuple[Any, ...]:
    """What tells whether the files of a local source have changed; () for others."""
    folder = miniglue.folder() if source == "miniglue" else Path(source).expanduser()
    if not folder.is_dir():
        return ()
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")) if path.is_file())
    return str(folder.resolve()), *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
