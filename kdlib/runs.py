"""A run: a validated configuration in, a folder with a record, a student and predictions out.

    config = runs.configure(task="mini-sst2", method="kd", temperature=2)
    record = runs.run(config)
    table = runs.results("_runs")

Every run has a folder of its own below `output_dir`, named after what it computes.  A finished run is not computed
again.  The teacher is a run too, one of method "fine_tune", so runs that need the same teacher share it.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import platform
import shutil
import subprocess
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from scipy.special import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kdlib
from kdlib import files, glue, losses, metrics, miniglue, models, trainer
from kdlib.batches import Encoded
from kdlib.imitation import Imitation
from kdlib.learner import PRECISIONS, Batch, Learner, accelerator_for, learner, refuse_many_processes
from kdlib.methods import Step, ikd, kd, lgtm, metadistil, online
from kdlib.progress import notice
from kdlib.tangent import TangentMethod

RECORD, STUDENT, TEACHER_FOLDER = "record.json", "student", "teacher"
ONLINE = ("prokt", "dml")
FEEDBACK = ("metadistil", "lgtm")
"""The methods that need feedback data."""
LEARNING_TEACHER = (*ONLINE, "ikd", *FEEDBACK)
"""The methods whose teacher changes while it teaches."""
METHODS = ("fine_tune", "kd", *LEARNING_TEACHER)
WATCHED = 128
"""Rows of the validation split on which `observe` compares each step with its teaching experiment."""
TEACHER, STUDENT_NETWORK = "tiny-2x64", "tiny-2x32"
"""Who learns from whom on MiniGLUE unless the configuration says otherwise."""
PRETRAINED_RATES = {models.MINILM: (1e-4, 2e-4)}
"""Learning rates of a teacher and a student: those of the papers suit BERT's 768 units, a network half as wide needs
larger ones.  Chosen on sentences held out of the training sets of SST-2 and STS-B."""


class ConfigurationError(ValueError):
    """A run configuration is wrong; the message lists every problem found."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on.  Make one with `configure`, which checks it and fills in what is None."""

    source: str = "miniglue"
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
    method: str = "kd"
    """"fine_tune" (the student alone), "kd" (a fixed teacher), and those whose teacher learns: "prokt", "dml",
    "metadistil", "ikd", "lgtm\""""
    teacher: str | None = None
    """"tiny-<layers>x<hidden>", "book-teacher", "minilm", a hub id, a folder, …, see `models`; None: tiny-2x64"""
    student: str | None = None
    """likewise; None: tiny-2x32, unless student_layers is given"""
    student_layers: int | None = None
    """cut the student's checkpoint, or without a student the teacher's, after so many layers"""
    untrained_teacher: bool | None = None
    """kd, metadistil, ikd: True: a teacher whose classifier was never trained may teach all the same; None: it is
    refused"""
    teacher_epochs: int | None = None
    """epochs of fine-tuning before the teacher teaches; 0: take it as it is, fine-tuned elsewhere or not at all;
    None: 0 for prokt, dml and lgtm, else 12 if tiny, else as the student's"""
    epochs: int | None = None
    """passes over the training set; None: 8 for tiny networks, 3 for pretrained ones"""
    batch_size: int = 32
    """samples of an optimiser step"""
    micro_batches: int = 1
    """cut each batch into so many pieces to save memory"""
    teacher_learning_rate: float | None = None
    """None: 1e-3 for tiny networks, 1e-4 for minilm, 3e-5 for other pretrained ones"""
    learning_rate: float | None = None
    """None: 2e-3 for tiny students, 2e-4 for minilm, 5e-5 for other pretrained ones"""
    weight_decay: float = 0.01
    """of AdamW, on matrices only"""
    warmup_ratio: float = 0.1
    """share of the steps in which the learning rate rises; it falls linearly afterwards"""
    max_grad_norm: float | None = None
    """longer gradients are scaled down, the student's and the teacher's; None: 1"""
    alpha: float | None = None
    """weight of the hard labels, 1 − alpha that of the teacher; None: 0.5, without labels 0"""
    labelled_course: bool | None = None
    """fine_tune, kd, ikd: False: only the feedback split has labels; fine-tuning takes it, and a student that has a
    teacher sees the other rows without; None: True"""
    temperature: float | None = None
    """softens teacher and student; None: 2"""
    objective: str | None = None
    """what the student imitates; None: "kl", for regression "logit_mse\""""
    pkd_weight: float | None = None
    """weight of PKD's term on hidden states, on top of the others; None: 0"""
    pkd_layers: str | None = None
    """the teacher's layers for it: "skip" (every so many) or "last"; None: "skip\""""
    pkd_normalisation: str | None = None
    """"sum" over layers and units, as PKD, or their "mean", as MetaDistil's code; None: "sum\""""
    teaching_rate: float | None = None
    """learning rate of a teacher while it teaches; None: teacher_learning_rate, for metadistil and ikd a tenth of it"""
    teacher_alpha: float | None = None
    """prokt, dml, lgtm: weight of the labels for the teacher, 1 − this that of the student; None: alpha"""
    teacher_objective: str | None = None
    """prokt, dml, lgtm: what the teacher imitates in the student; None: the student's objective, roles exchanged"""
    first: str | None = None
    """prokt, dml: who is updated first, "teacher", "student" or "simultaneous"; None: teacher, for dml simultaneous"""
    zero_classifiers: bool | None = None
    """prokt, dml, lgtm: start both classifiers at zero; None: where the teacher is not fine-tuned, dist aside"""
    pilot_update: bool | None = None
    """metadistil: the student learns from the teacher that its pilot copy has improved; None: True"""
    inner_steps: int | None = None
    """metadistil: steps of the pilot copy, differentiated through; None: 1"""
    pilot_rule: str | None = None
    """metadistil, lgtm: the pilot copy's step, "sgd" or "adamw"; None: "sgd", for influence "released" "adamw\""""
    pilot_learning_rate: float | None = None
    """metadistil, ikd, lgtm: its learning rate; None: the student's, as it is at that step"""
    tangent: str | None = None
    """metadistil, ikd, lgtm: derivative of the student by "jvp", "finite-difference" (central), "forward-difference" or
    "double-backward"; None: "jvp\""""
    tangent_precision: str | None = None
    """metadistil, ikd, lgtm: pilot step and derivative in "fp32" or, with mixed precision, "autocast"; None: "fp32\""""
    pilot_pieces: int | None = None
    """metadistil, lgtm: cut the batches of pilot step and feedback gradient into so many to save memory; None: 1"""
    feedback_batch_size: int | None = None
    """samples of a feedback batch; None: batch_size"""
    observe: bool | None = None
    """metadistil: measure at every step what the pilot update is worth (four more passes); lgtm: how large the
    influence term is beside the auxiliary loss (two more backward passes); None: False"""
    meta_weight: float | None = None
    """ikd: weight γ of the student's exam in the teacher's loss, 1 − this that of the labels; None: 0.5"""
    feedback_at: str | None = None
    """ikd: the exam "after" the course step, exact, or "before" it, the shortcut; None: "before\""""
    exam: str | None = None
    """ikd: the "course" batch again, another batch of "train", or of "feedback"; None: "course", without labels
    "feedback\""""
    influence: str | None = None
    """lgtm: the influence term, "weighted" (eq. 9), "printed" (eq. 10), "meta" (its sign turned) or "released" (as in
    the code); None: "weighted\""""
    influence_weight: float | str | None = None
    """lgtm: its weight, a number, "student_rate" or "teacher_rate"; None: 1, for "released" "teacher_rate\""""
    influence_share: float | None = None
    """lgtm: in place of a weight, the length of its gradient over that of the auxiliary loss's; None: no"""
    feedback_every: int | None = None
    """lgtm: steps from one influence term to the next; None: 1"""
    feedback_layers: int | None = None
    """lgtm: influence through the student's last so many layers, pooler and head only; None: through all weights"""
    feedback_from: str | None = None
    """metadistil, lgtm: "validation" takes the feedback from the validation split, as the papers do, whose scores then
    mean nothing; None: from the training set"""
    max_length: int = 128
    """word pieces kept of an example"""
    feedback_fraction: float | None = None
    """share of the training set carved out as feedback data, which nobody trains on; None: 0, 0.1 where it is needed"""
    seed: int = 0
    """of the student: initial weights, order of the data, dropout"""
    teacher_seed: int = 0
    """likewise of the teacher"""
    max_train: int | None = None
    """train on a random subset of so many samples"""
    max_evaluation: int | None = None
    """evaluate on a random subset of so many samples of each evaluation split"""
    max_steps: int | None = None
    """stop each training after so many steps"""
    evaluate_every: int | None = None
    """steps between evaluations; None: an epoch"""
    checkpoint_every: int | None = None
    """steps between checkpoints; None: at each evaluation"""
    max_seconds: float | None = None
    """stop after so long with a checkpoint; the same command goes on from it"""
    precision: str = "fp32"
    """"fp32", "bf16" or "fp16" (GPU only)"""
    device: str = "auto"
    """"auto", "cpu" or "cuda\""""
    predict_test: bool = True
    """also write predictions for test splits whose labels are hidden, for a submission"""
    output_dir: str = "_runs"
    """the folder that holds all runs"""
    resume: bool = True
    """go on with an interrupted run and reuse a finished one; False: start afresh, the teacher included"""

    @property
    def glue_task(self) -> glue.Task:
        """The task's description, the generic one for a data set of your own."""
        if self.text_columns is None:
            return glue.task_for(self.task)
        names = () if self.regression else None
        chosen = None if self.metrics is None else _listed(self.metrics)
        return glue.generic_task(
            self.task, _listed(self.text_columns), names, chosen, test_splits=None, label_column=self.label_column
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as they were given: all but where it is computed, kept, how often saved.

        See `run_id` for what lies outside the package.
        """
        fields = dataclasses.asdict(self)
        unused = {name for name in (*OF_METHODS, *_LATER) if fields[name] is None}
        return {name: value for name, value in fields.items() if name not in _NOT_IDENTITY and name not in unused}

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
        return name_of(f"{self.task}-{self.method}-seed{self.seed}", {**self.identity, **contents(self)})

    @property
    def folder(self) -> Path:
        """Where this run keeps its record, checkpoint, student and predictions."""
        return Path(self.output_dir).expanduser() / self.run_id


def name_of(what: str, identity: dict[str, Any]) -> str:
    """A readable name that is unique for an identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{what.replace('/', '-')}-{digest[:8]}"


def contents(config: RunConfig) -> dict[str, str]:
    """What data and networks from outside the package are, by content, in place of their paths; {} for the book's own.

    Data have a fingerprint of the rows that the run reads; a folder with a network one of its weights, configuration
    and tokenizer; a network from the hub its id and commit.
    """
    found = {} if config.source == "miniglue" else {"source": _fingerprint(*_what_to_load(config))}
    for who in ("teacher", "student"):
        name = getattr(config, who)
        if name is not None and (content := models.content(name)) is not None:
            found[who] = content
    return found


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


_NOT_IDENTITY = ("output_dir", "resume", "device", "checkpoint_every", "max_seconds")
_LATER = ("metrics", "max_grad_norm", "untrained_teacher")
"""Fields that came after the first records were made: no part of a run's identity where they are None."""
_IMITATING = ("alpha", "temperature", "objective")
_PATIENT = ("pkd_weight", "pkd_layers", "pkd_normalisation")
_ONLINE = ("teacher_alpha", "teacher_objective", "first", "zero_classifiers")
_META = (
    *("pilot_update", "inner_steps", "pilot_rule", "pilot_learning_rate", "tangent", "tangent_precision"),
    *("pilot_pieces", "feedback_batch_size", "observe"),
)
_IKD = ("meta_weight", "feedback_at", "exam")
_LGTM = ("influence", "influence_weight", "influence_share", "feedback_every", "feedback_layers")
OF_METHODS = (*_PATIENT, "teaching_rate", "labelled_course", *_ONLINE, *_META, "feedback_from", *_IKD, *_LGTM)
"""Fields that are None wherever a method does not use them, and no part of a run's identity there."""
_TAUGHT, _MUTUAL = tuple(name for name in METHODS if name != "fine_tune"), (*ONLINE, "lgtm")
_PILOTED = ("metadistil", "ikd", "lgtm")
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_IMITATING, *_PATIENT, "teacher_epochs", "teacher_learning_rate", "teacher_seed"), _TAUGHT),
    "labelled_course": ("fine_tune", "kd", "ikd"),
    "untrained_teacher": ("kd", "metadistil", "ikd"),
    "teaching_rate": LEARNING_TEACHER,
    **dict.fromkeys(("teacher_alpha", "teacher_objective", "zero_classifiers"), _MUTUAL),
    "first": ONLINE,
    **dict.fromkeys(("pilot_update", "inner_steps"), ("metadistil",)),
    **dict.fromkeys(("pilot_rule", "pilot_pieces", "observe", "feedback_from"), FEEDBACK),
    **dict.fromkeys(("pilot_learning_rate", "tangent", "tangent_precision", "feedback_batch_size"), _PILOTED),
    **dict.fromkeys(_IKD, ("ikd",)),
    **dict.fromkeys(_LGTM, ("lgtm",)),
}
"""The methods that read a field; what is not listed all of them read."""
_STEPS, _SEED = 10**9, 2**32 - 1
_POSITIVE: dict[str, float] = {
    **dict.fromkeys(("epochs", "max_steps", "evaluate_every", "checkpoint_every", "feedback_every"), _STEPS),
    **dict.fromkeys(("max_train", "max_evaluation"), 10**12),
    **dict.fromkeys(("batch_size", "micro_batches", "pilot_pieces", "feedback_batch_size", "max_length"), 10**6),
    **dict.fromkeys(("student_layers", "inner_steps"), 1000),
    **dict.fromkeys(("learning_rate", "teacher_learning_rate", "teaching_rate", "pilot_learning_rate"), 1e3),
    **dict.fromkeys(("temperature", "max_grad_norm", "max_seconds"), 1e9),
}
"""Numbers above 0, and the largest that means anything."""
_AT_LEAST_ZERO: dict[str, float] = {
    **dict.fromkeys(("teacher_epochs",), _STEPS),
    **dict.fromkeys(("seed", "teacher_seed"), _SEED),
    **dict.fromkeys(("weight_decay", "pkd_weight", "influence_share"), 1e6),
    "feedback_layers": 1000,
}
_SMALLEST_TEMPERATURE = 1e-3
"""Logits are divided by it; float32 has no room for much less."""
_UNIT_INTERVAL = ("alpha", "teacher_alpha", "meta_weight", "warmup_ratio", "feedback_fraction")


def configure(**parameters: Any) -> RunConfig:
    """Check `parameters`, fill in the defaults that depend on others, and return the configuration.

    What the method does not read is refused (`readable` leaves it out), so that two configurations that compute the
    same are equal and none means something else than it says.

    Raises ConfigurationError with one message that lists all problems and, for names, the nearest valid ones.
    """
    known, problems = typed(RunConfig, parameters)
    config = RunConfig(**known)
    problems += path_problems(config, ("source", "output_dir", "teacher", "student"))
    problems += bound_problems(config, _POSITIVE, _AT_LEAST_ZERO)
    for name in _UNIT_INTERVAL:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            problems.append(f"{name} is {value}; expected a number between 0 and 1")
    if config.temperature is not None and 0 < config.temperature < _SMALLEST_TEMPERATURE:
        problems.append(f"temperature is {config.temperature}; expected at least {_SMALLEST_TEMPERATURE}")
    task = None
    try:
        task = config.glue_task
    except ValueError as error:
        problems.append(str(error))
    problems += _choice_problems(config, task)
    problems += unread_problems(config, config.method, READ_BY, METHODS)
    refuse(problems)
    return _complete(config)


def readable(parameters: typing.Mapping[str, Any], method: str) -> dict[str, Any]:
    """Those of the parameters that `method` reads: for a grid whose methods share settings."""
    alone = method == "fine_tune" and parameters.get("student") is not None
    read = {name: value for name, value in parameters.items() if method in READ_BY.get(name, METHODS)}
    return {name: value for name, value in read.items() if not (alone and name == "teacher")}


def unread_problems(
    config: Any, method: str, read_by: typing.Mapping[str, typing.Sequence[str]], methods: typing.Sequence[str]
) -> list[str]:
    """A sentence on the fields that differ from their defaults and that the method does not read, if there are any."""
    given = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    defaults = {entry.name: entry.default for entry in dataclasses.fields(config)}
    unread = [n for n, value in given.items() if value != defaults[n] and method not in read_by.get(n, methods)]
    if not unread or method not in methods:
        return []
    said = "; ".join(f"{name} = {given[name]!r} (for {', '.join(read_by[name])})" for name in unread)
    return [f"method {method!r} does not read {said}: leave {'it' if len(unread) == 1 else 'them'} out"]


def bound_problems(
    config: Any, positive: typing.Mapping[str, float], at_least_zero: typing.Mapping[str, float]
) -> list[str]:
    """One sentence for each number that is not finite, too small, or larger than anything it could mean."""
    problems = []
    for bounds, expected in ((positive, "a positive number"), (at_least_zero, "0 or more")):
        for name, highest in bounds.items():
            value = getattr(config, name)
            if value is None:
                continue
            low = value > 0 if bounds is positive else value >= 0
            if not low or value == float("inf"):
                problems.append(f"{name} is {value}; expected {expected}")
            elif value > highest:
                problems.append(f"{name} is {value}; expected {highest:,} at most")
    return problems


MAX_NAME = 100
"""Characters of a corpus's name, which names folders."""


def path_problems(config: Any, names: typing.Sequence[str]) -> list[str]:
    """One sentence for each path or name that is empty or that no file system knows."""
    problems = []
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        printable = "\0" not in value and value.encode(errors="ignore").decode() == value
        if not value.strip() or not printable:
            problems.append(f"{name} is {value!r}; expected a name or a path, or leave it out")
    return problems


def typed(kind: type, parameters: typing.Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parameters that are fields of the dataclass `kind` and have its type, and what is wrong with the others."""
    problems: list[str] = []
    hints = typing.get_type_hints(kind)
    for name, value in parameters.items():
        if name not in hints:
            problems.append(f"unknown parameter {name!r}{nearest(name, hints)}")
        elif not _has_type(value, hints[name]):
            problems.append(f"{name} is {value!r} ({type(value).__name__}); expected {_type_name(hints[name])}")
    known = {n: v for n, v in parameters.items() if n in hints and _has_type(v, hints[n])}
    return {n: float(v) if _is_float(hints[n]) and isinstance(v, int) else v for n, v in known.items()}, problems


def refuse(problems: list[str]) -> None:
    """Raise ConfigurationError with one message that lists all problems, if there are any."""
    if problems:
        raise ConfigurationError("the run configuration is wrong:\n" + "\n".join(f"  - {p}" for p in problems))


def _complete(config: RunConfig) -> RunConfig:
    """Fill in None by rule; reset what the method does not use."""
    teacher = config.teacher or TEACHER
    student = config.student
    if student is None and config.student_layers is None:
        student = STUDENT_NETWORK
    tiny_student = models.is_tiny(student or teacher)
    epochs = _default(config.epochs, 8 if tiny_student else 3)
    filled: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "epochs": epochs,
        "learning_rate": _default(config.learning_rate, _rates(student or teacher)[1]),
    }
    if config.method == "fine_tune":
        filled |= dict.fromkeys(("teacher_epochs", "teacher_learning_rate", *_IMITATING, *OF_METHODS))
        filled |= {"teacher_seed": 0, "teacher": teacher if student is None else None}
        filled |= _labels(config)
        return dataclasses.replace(config, **filled)
    filled |= {
        "teacher_epochs": _default(config.teacher_epochs, _teacher_epochs(config.method, teacher, epochs)),
        "teacher_learning_rate": _default(config.teacher_learning_rate, _rates(teacher)[0]),
        "alpha": _default(config.alpha, 0.0 if config.labelled_course is False else 0.5),
        "temperature": _default(config.temperature, 1.0 if config.method == "dml" else 2.0),
        "objective": config.objective or ("logit_mse" if config.glue_task.is_regression else "kl"),
        **_labels(config),
    }
    if config.pkd_weight:
        filled |= {"pkd_layers": config.pkd_layers or "skip", "pkd_normalisation": config.pkd_normalisation or "sum"}
    else:
        filled |= dict.fromkeys(_PATIENT)
    filled |= _of_the_teacher(dataclasses.replace(config, **filled))
    return dataclasses.replace(config, **filled)


def _labels(config: RunConfig) -> dict[str, Any]:
    """Which labels may be read, and how much is carved out as feedback data."""
    few = config.labelled_course is False
    carved = few or config.method in FEEDBACK or (config.method == "ikd" and config.exam == "feedback")
    carved = carved and config.feedback_from is None
    fraction = _default(config.feedback_fraction, 0.1 if carved else 0.0)
    return {"labelled_course": False if few else None, "feedback_fraction": fraction}


def _rates(network: str) -> tuple[float, float]:
    """The learning rates of `network` as a teacher and as a student."""
    return (1e-3, 2e-3) if models.is_tiny(network) else PRETRAINED_RATES.get(network, (3e-5, 5e-5))


def _of_the_teacher(config: RunConfig) -> dict[str, Any]:
    """The fields of methods whose teacher learns: a default for those in use, None for the others."""
    filled: dict[str, Any] = dict.fromkeys(set(OF_METHODS) - {*_PATIENT, "labelled_course"})
    if config.method in LEARNING_TEACHER:
        rate = config.teacher_learning_rate * (0.1 if config.method in ("metadistil", "ikd") else 1)
        filled["teaching_rate"] = _default(config.teaching_rate, rate)
    if config.method in (*ONLINE, "lgtm"):
        filled |= {
            "teacher_alpha": _default(config.teacher_alpha, config.alpha),
            "teacher_objective": config.teacher_objective or config.objective,
            "zero_classifiers": _default(
                config.zero_classifiers,
                config.teacher_epochs == 0 and config.teacher != models.BOOK_TEACHER and config.objective != "dist",
            ),
        }
    if config.method in ONLINE:
        filled["first"] = config.first or ("simultaneous" if config.method == "dml" else "teacher")
    if config.method in FEEDBACK:
        filled |= {
            "pilot_pieces": None if config.pilot_pieces == 1 else config.pilot_pieces,
            "pilot_rule": config.pilot_rule or ("adamw" if config.influence == "released" else "sgd"),
            "pilot_learning_rate": config.pilot_learning_rate,
            "tangent": config.tangent or "jvp",
            "tangent_precision": config.tangent_precision or "fp32",
            "feedback_batch_size": _default(config.feedback_batch_size, config.batch_size),
            "observe": _default(config.observe, False),
            "feedback_from": config.feedback_from,
        }
    if config.method == "metadistil":
        filled |= {
            "pilot_update": _default(config.pilot_update, True),
            "inner_steps": _default(config.inner_steps, 1),
        }
    if config.method == "lgtm":
        weight = None if config.influence_share is not None else config.influence_weight
        if weight is None and config.influence_share is None:
            weight = "teacher_rate" if config.influence == "released" else 1.0
        filled |= {
            "influence": config.influence or "weighted",
            "influence_weight": weight,
            "influence_share": config.influence_share,
            "feedback_every": _default(config.feedback_every, 1),
            "feedback_layers": config.feedback_layers,
        }
    if config.method == "ikd":
        exam = config.exam or ("course" if config.labelled_course is None else "feedback")
        filled |= {
            "meta_weight": _default(config.meta_weight, 0.5),
            "feedback_at": config.feedback_at or "before",
            "exam": exam,
            "pilot_learning_rate": config.pilot_learning_rate,
            "tangent": config.tangent or "jvp",
            "tangent_precision": config.tangent_precision or "fp32",
            "feedback_batch_size": None
            if exam == "course"
            else _default(config.feedback_batch_size, config.batch_size),
        }
    return filled


def _teacher_epochs(method: str, teacher: str, student_epochs: int) -> int:
    if teacher == models.BOOK_TEACHER or method in (*ONLINE, "lgtm"):
        return 0
    return 12 if models.is_tiny(teacher) else student_epochs


def _default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _choice_problems(config: RunConfig, task: glue.Task | None) -> list[str]:
    problems = []
    choices = {
        "method": METHODS,
        "precision": tuple(PRECISIONS),
        "device": ("auto", "cpu", "cuda"),
        "objective": tuple(losses.OBJECTIVES),
        "teacher_objective": tuple(losses.TEACHER_OBJECTIVES),
        "first": online.ORDERS,
        "pkd_layers": ("skip", "last"),
        "pkd_normalisation": ("sum", "mean"),
        "pilot_rule": metadistil.PILOT_RULES,
        "tangent": typing.get_args(TangentMethod),
        "tangent_precision": ("fp32", "autocast"),
        "feedback_at": ikd.FEEDBACK_AT,
        "exam": ikd.EXAMS,
        "influence": lgtm.VARIANTS,
        "feedback_from": ("validation",),
    }
    for name, valid in choices.items():
        value = getattr(config, name)
        if value is not None and value not in valid:
            problems.append(f"{name} is {value!r}; expected one of {', '.join(valid)}{nearest(value, valid)}")
    if config.method == "fine_tune" and config.teacher is not None and config.student is not None:
        problems.append(
            f"teacher is {config.teacher!r}, but method 'fine_tune' trains the student {config.student!r} alone: leave "
            "it out"
        )
    if config.text_columns is None:
        for name in ("label_column", "regression", "metrics"):
            if getattr(config, name) != RunConfig.__dataclass_fields__[name].default:
                problems.append(
                    f"{name} is {getattr(config, name)!r}, which describes data of your own: give text_columns, too"
                )
    if not config.pkd_weight:
        for name in ("pkd_layers", "pkd_normalisation"):
            if config.method in _TAUGHT and getattr(config, name) is not None:
                problems.append(f"{name} is {getattr(config, name)!r}, but pkd_weight is 0, which leaves PKD out")
    own_exam = config.method == "ikd" and config.exam in (None, "course") and config.labelled_course is not False
    if own_exam and config.feedback_batch_size is not None:
        problems.append(
            f"feedback_batch_size is {config.feedback_batch_size}, but the exam is the course batch itself: leave it "
            "out, or give exam 'train' or 'feedback'"
        )
    for name in ("objective", "teacher_objective") if task is not None and task.is_regression else ():
        if getattr(config, name) not in (None, *losses.REGRESSION_OBJECTIVES):
            problems.append(
                f"{name} is {getattr(config, name)!r}, but {task.name} is a regression task, where a softmax has no "
                f"meaning; expected {', '.join(losses.REGRESSION_OBJECTIVES)}"
            )
    problems += _teaching_problems(config)
    names = [n for n in (config.teacher, config.student) if n is not None]
    for name in names:
        if name.startswith("tiny") and not models.is_tiny(name):
            problems.append(f"{name!r} is not of the form 'tiny-<layers>x<hidden>', for example 'tiny-2x64'")
    fresh = models.is_fresh(config.teacher or TEACHER)
    if fresh and config.teacher_epochs == 0 and config.method in READ_BY["untrained_teacher"]:
        problems += [] if config.untrained_teacher else [untrained(config.teacher or TEACHER, config.method)]
    if config.source != "miniglue" and models.is_small(config.teacher or TEACHER) and config.method != "fine_tune":
        problems.append(
            f"source {config.source!r} needs a pretrained teacher: tiny networks read MiniGLUE's small vocabulary. "
            "Give teacher 'minilm', a hub id or a folder"
        )
    if config.source != "miniglue" and config.student is None and config.student_layers is None:
        problems.append(f"source {config.source!r} needs a student: give student or student_layers")
    return problems


def untrained(teacher: str, method: str) -> str:
    """What is wrong with a teacher whose head is new."""
    return (
        f"the head of teacher {teacher!r} was never trained, and {method} would teach its random answers: leave "
        "teacher_epochs out, or give the epochs of a fine-tuning, or a teacher that was fine-tuned elsewhere "
        "(untrained_teacher=True asks for this one by name)"
    )


def _teaching_problems(config: RunConfig) -> list[str]:
    """What does not go together where the teacher learns."""
    problems = []
    if config.method in LEARNING_TEACHER and config.precision == "fp16":
        problems.append(
            f"precision 'fp16' has one loss scale for two networks that learn; {config.method} needs 'bf16'"
        )
    if config.objective in losses.BATCH_OBJECTIVES and config.micro_batches > 1 and config.method not in FEEDBACK:
        problems.append(
            f"micro_batches is {config.micro_batches}: objective {config.objective!r} compares the samples of a whole "
            "batch; take 1 and a smaller batch_size"
        )
    if config.method in FEEDBACK:
        try:
            metadistil.check_pieces(config.pilot_pieces or 1, losses.OBJECTIVES.get(config.objective or "kl"))
        except ValueError as error:
            problems.append(str(error))
        if config.feedback_fraction == 0 and config.feedback_from is None:
            problems.append(
                f"feedback_fraction is 0, but {config.method} needs a feedback split; leave it out, or give 0.1"
            )
        if config.feedback_fraction and config.feedback_from is not None:
            problems.append("feedback_fraction and feedback_from 'validation' are both given; give one")
    try:
        if config.method == "metadistil":
            rule = (
                config.pilot_rule if config.pilot_rule in metadistil.PILOT_RULES else "sgd"
            )  # another one: said above
            metadistil.check_settings(config.inner_steps or 1, rule, config.micro_batches)
        if config.method == "lgtm":
            if config.influence_weight is not None and config.influence_share is not None:
                problems.append("influence_weight and influence_share are both given; give one")
            imitation = Imitation(1.0 if config.alpha == 1 else 0.5)  # of alpha only this matters here
            weight = _default(config.influence_weight, 1.0)
            lgtm.check_settings(imitation, None, weight=weight, micro_batches=config.micro_batches)
    except ValueError as error:
        problems.append(str(error))
    return problems + _ikd_problems(config)


def _ikd_problems(config: RunConfig) -> list[str]:
    """What does not go together for ikd, and where the course has no labels."""
    problems = []
    few = config.labelled_course is False
    if few and config.method == "kd" and config.alpha:
        problems.append(f"alpha is {config.alpha}, a weight for the labels of a course that has none; expected 0")
    if config.method == "ikd":
        if few and config.exam not in (None, "feedback"):
            problems.append(f"exam is {config.exam!r}, but only the feedback split has labels; expected 'feedback'")
        try:
            alpha = (config.alpha or 0.0) if few else 0.5
            ikd.check_settings(0.5, "before", not few, alpha, config.micro_batches)
        except ValueError as error:
            problems.append(str(error))
    if config.feedback_fraction == 0 and (few or (config.method == "ikd" and config.exam == "feedback")):
        problems.append("feedback_fraction is 0, but labels or exams come from there; leave it out, or give 0.1")
    return problems


def _has_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _is_float(hint: Any) -> bool:
    return float in (typing.get_args(hint) or (hint,))


def _type_name(hint: Any) -> str:
    options = typing.get_args(hint) or (hint,)
    return " or ".join("None" if option is type(None) else option.__name__ for option in options)


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """A question that names the most similar valid names, or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


@dataclass
class RunRecord:
    """What is known of a finished run; stored as `record.json` in its folder."""

    run_id: str
    config: dict[str, Any]
    metrics: dict[str, float]
    """of the best checkpoint, by split and metric: "validation/accuracy" … ; also on the test split where labelled"""
    best_step: int
    history: list[dict[str, float]]
    """one row an evaluation"""
    seconds: float
    """of the training alone, evaluations included, interruptions not"""
    samples: dict[str, int]
    parameters: int
    teacher: str | None
    """the teacher's run, if it was fine-tuned here"""
    oracle: dict[str, float]
    """against MiniGLUE's true posterior; empty elsewhere"""
    environment: dict[str, str]
    git_commit: str | None
    finished: str
    contents: dict[str, str] = field(default_factory=dict)
    """what data and networks from outside the package were, see `contents`"""
    unknown: dict[str, float] = field(default_factory=dict)
    """the share of word pieces that the vocabulary does not have, by split; only where there are any"""
    notes: list[str] = field(default_factory=list)
    """what was decided when the data were read, see `glue.load`"""
    folder: Path = field(default=Path(), compare=False)

    @property
    def history_frame(self) -> pd.DataFrame:
        """The history as a pandas frame."""
        return pd.DataFrame(self.history)


def run(config: RunConfig) -> RunRecord:
    """Compute a run, or return its record if it is finished already.

    The folder then holds `record.json`, the student as a folder for `from_pretrained`, and GLUE-format predictions of
    the test split.  An interrupted run goes on from its checkpoint.  A run that another process computes is waited for.

    Raises what data, models and trainer raise; before any work is done where that is possible.  Raises
    `trainer.TrainingInterruptedError` when `max_seconds` are over or somebody asked the process to end.
    """
    refuse_many_processes()
    config = afresh(config)
    return once(config.folder, lambda: _compute(config))


def afresh(config: RunConfig) -> RunConfig:
    """Where `resume` is False: forget what is left of this run and of its teacher's, say so, and let resuming begin.

    Several runs that follow each other can so share what the first of them computes anew.
    """
    if config.resume:
        return config
    left = [config] if config.method == "fine_tune" or config.teacher_epochs == 0 else [config, teacher_config(config)]
    for each in left:
        forget(each.folder)
    notice(f"resume is False: {' and '.join(each.run_id for each in left)} start afresh")
    return dataclasses.replace(config, resume=True)


def forget(folder: Path) -> None:
    """Remove what a run left in `folder`, the record first; nothing else.  Waits for a process that computes it.

    Raises CheckpointError if the folder cannot be written.
    """
    if folder.exists():
        with trainer.alone_in(folder):
            (folder / RECORD).unlink(missing_ok=True)
            _clear(folder)
            for state in (trainer.CHECKPOINT, trainer.BEST):
                (folder / state).unlink(missing_ok=True)


def once(folder: Path, compute: Callable[[], RunRecord]) -> RunRecord:
    """The record in `folder` if there is one, else what `compute` returns.

    While it computes, others who want the same run wait.  What a finished run whose record is gone has left is removed
    before: it may be of other data.  Raises CheckpointError if `folder` cannot be written.
    """
    with trainer.writing_to(folder):  # a name that is too long for a file is an error here already
        finished = (folder / RECORD).exists()
    if finished:
        return read_record(folder)  # without a lock, which a folder that is only read could not hold
    with trainer.alone_in(folder):
        if (folder / RECORD).exists():
            return read_record(folder)
        trainer.prepare_folder(folder)
        _clear(folder)
        return compute()


def _clear(folder: Path) -> None:
    """Remove what only a finished run has: networks, predictions, logits."""
    for left in (STUDENT, TEACHER_FOLDER):
        shutil.rmtree(folder / left, ignore_errors=True)
    for left in (*folder.glob(f"{trainer.LOGITS}*"), *folder.glob("*.tsv")):
        left.unlink()


def _compute(config: RunConfig) -> RunRecord:
    folder, started = config.folder, time.perf_counter()
    accelerator = accelerator_for(config.device, config.precision)
    data = load_data(config)
    tokenizer = models.load_tokenizer(config.teacher or config.student)
    student_network = load_student(config, data.task, tokenizer)
    encoded = encode_all(data, tokenizer, config.max_length)
    check_lengths(encoded, student_network, config.student or f"the student of {config.student_layers} layers")
    # Without labels elsewhere, fine-tuning has the feedback split alone.
    course = encoded["feedback" if config.method == "fine_tune" and config.labelled_course is False else "train"]
    student = _learner("student", student_network, config, accelerator, len(course))
    teacher_record, teacher, step = _method(config, data, tokenizer, student, encoded)
    evaluated = {name: encoded[name] for name in data.evaluation}
    result = trainer.train(
        step,
        [student] if teacher is None else [student, teacher],
        course,
        _schedule(config),
        trainer.evaluation(student, data.task, evaluated, others=[] if teacher is None else [teacher]),
        select=f"{next(iter(data.evaluation))}/{data.task.metrics[0]}",
        keep=student,
        folder=folder,
        identity={**config.identity, **contents(config)},
        feedback=feedback_data(config, data, encoded),
        feedback_batch_size=config.feedback_batch_size,
        max_seconds=None if config.max_seconds is None else config.max_seconds - (time.perf_counter() - started),
    )
    if teacher is not None:
        save_pretrained(teacher.module, tokenizer, folder / TEACHER_FOLDER)
    return _finish(config, data, encoded, student, tokenizer, result, teacher_record)


def teacher_config(config: RunConfig) -> RunConfig:
    """The run that fine-tunes the teacher of `config`, the same for every run that can share it.

    Raises ValueError if the method has no teacher or the teacher needs no fine-tuning.
    """
    if config.method == "fine_tune" or config.teacher_epochs == 0:
        raise ValueError(f"the run {config.run_id} fine-tunes no teacher")
    chosen = {
        "method": "fine_tune",
        "student": config.teacher,
        "student_layers": None,
        "epochs": config.teacher_epochs,
        "learning_rate": config.teacher_learning_rate,
        "seed": config.teacher_seed,
        "predict_test": False,
    }
    return _complete(dataclasses.replace(config, **chosen))


def teacher_of(config: RunConfig) -> tuple[str, RunRecord | None]:
    """Where the teacher of `config` is, fine-tuned if need be, and its record (None if it was fine-tuned elsewhere)."""
    if config.teacher_epochs == 0:
        return config.teacher, None
    record = run(teacher_config(config))
    if not (record.folder / STUDENT / "config.json").exists():
        notice(f"the network of the finished run {record.run_id} is gone: it is computed again")
        forget(record.folder)
        record = run(teacher_config(config))
    return str(record.folder / STUDENT), record


def load_data(config: RunConfig) -> glue.TaskData:
    """The run's data, checked, with the feedback split carved out; read again only if the files have changed."""
    return _loaded(*_what_to_load(config))


def _what_to_load(config: RunConfig) -> tuple:
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
    signature: tuple,
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


def _signature(source: str) -> tuple:
    """What tells whether the files of a local source have changed; () for others."""
    folder = miniglue.folder() if source == "miniglue" else Path(source).expanduser()
    if not folder.is_dir():
        return ()
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")) if path.is_file())
    return str(folder.resolve()), *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def load_student(config: RunConfig, task: glue.Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The student before training: loaded by name, or cut from its checkpoint or the teacher's.

    Raises ValueError if the student reads other words than its teacher, and what `models` raises.
    """
    named = config.student
    if named is not None and config.teacher is not None and not models.is_small(named) and not models.is_fresh(named):
        theirs, ours = tokenizer.get_vocab(), models.load_tokenizer(named).get_vocab()
        if theirs != ours:
            raise ValueError(
                f"student {named!r} ({len(ours)} word pieces) and teacher {config.teacher!r} ({len(theirs)}) "
                "have different tokenizers: distillation needs one vocabulary"
            )
    network = models.load(named or config.teacher, task, tokenizer, config.seed)
    if config.student_layers is None:
        return network
    return models.first_layers(network, config.student_layers, config.seed)


def check_lengths(encoded: typing.Mapping[str, Encoded], network: PreTrainedModel, name: str) -> None:
    """Raise ValueError if a split holds an example that is longer than what the network can read."""
    longest = models.longest(network)
    for split, samples in encoded.items():
        if longest is not None and len(samples) and (found := int(samples.lengths.max())) > longest:
            row = int(samples.rows[samples.lengths.argmax()])
            raise ValueError(
                f"{name} reads {longest} word pieces at most, but row {row} of {split} has {found}: give max_length "
                f"{longest}, which cuts longer texts"
            )


def encode_all(data: glue.TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Encoded]:
    """Tokenise every split once: "train", "feedback" if there is one, the evaluation and the test splits, by name."""
    feedback = {} if data.feedback is None else {"feedback": data.feedback}
    splits = {"train": data.train, **feedback, **data.evaluation, **data.test}
    return {name: glue.encode(split, data.task, tokenizer, max_length) for name, split in splits.items()}


def _schedule(config: RunConfig) -> trainer.Schedule:
    return trainer.Schedule(
        config.epochs,
        config.batch_size,
        config.max_steps,
        config.evaluate_every,
        config.checkpoint_every,
        config.seed,
    )


def _learner(name: str, network: PreTrainedModel, config: RunConfig, accelerator: Accelerator, samples: int) -> Learner:
    """Student or teacher with the optimiser of the configuration."""
    return learner(
        name,
        network,
        accelerator,
        config.learning_rate if name == "student" else config.teaching_rate,
        _schedule(config).total_steps(samples),
        config.weight_decay,
        config.warmup_ratio,
        _default(config.max_grad_norm, 1.0),
        config.micro_batches,
    )


def _method(
    config: RunConfig,
    data: glue.TaskData,
    tokenizer: PreTrainedTokenizerBase,
    student: Learner,
    encoded: dict[str, Encoded],
) -> tuple[RunRecord | None, Learner | None, Step]:
    """The record of the teacher's fine-tuning, the teacher if it learns, and the step of the configured method."""
    if config.method == "fine_tune":
        return None, None, kd.fine_tuning(student)
    where, record = teacher_of(config)
    # What the fine-tuning drew has made another head; a teacher that starts untrained has a seed of its own.
    network = models.load(where, data.task, tokenizer, config.teacher_seed)
    models.check_pair(network, student.module)
    check_lengths(encoded, network, f"teacher {config.teacher!r}")
    if config.teacher_epochs == 0 and models.head_is_new(network) and config.method in READ_BY["untrained_teacher"]:
        refuse([] if config.untrained_teacher else [untrained(config.teacher, config.method)])
    accelerator, imitation = student.accelerator, imitation_of(config)
    if config.method == "kd":
        if imitation.wanted:  # hidden states of a whole training set are too many to keep
            network.to(accelerator.device)
            return record, None, kd.distillation(student, lambda b: models.targets(network, b, True), imitation)
        cache = None if record is None else record.folder
        looked_up = trainer.teacher_logits(network, encoded["train"], accelerator, cache=cache)
        return record, None, kd.distillation(student, lambda b: models.Outputs(looked_up(b)), imitation)
    teacher = _learner("teacher", network, config, accelerator, len(encoded["train"]))
    if config.zero_classifiers:
        for module in (student.module, network):
            online.zero_classifier(module)
    if config.method in (*ONLINE, "lgtm"):
        learned = Imitation(
            config.teacher_alpha, config.temperature, losses.TEACHER_OBJECTIVES[config.teacher_objective]
        )
    if config.method in ONLINE:
        return record, teacher, online.online_distillation(student, teacher, imitation, learned, config.first)
    if config.method == "ikd":
        return (
            record,
            teacher,
            ikd.ikd(
                student,
                teacher,
                imitation,
                config.meta_weight,
                config.feedback_at,
                config.labelled_course is None,
                config.pilot_learning_rate,
                config.tangent,
                config.tangent_precision,
            ),
        )
    if config.method == "lgtm":
        step = lgtm.lgtm(
            student,
            teacher,
            imitation,
            learned,
            config.influence,
            _default(config.influence_weight, 1.0),
            config.influence_share,
            config.pilot_rule,
            config.pilot_learning_rate,
            config.tangent,
            config.tangent_precision,
            config.feedback_every,
            config.feedback_layers,
            config.observe,
            pilot_pieces=config.pilot_pieces or 1,
        )
        return record, teacher, step
    watch = watched_batch(next(iter(data.evaluation)), encoded, accelerator) if config.observe else None
    step = metadistil.metadistil(
        student,
        teacher,
        imitation,
        config.pilot_update,
        config.inner_steps,
        config.pilot_rule,
        config.pilot_learning_rate,
        config.tangent,
        config.tangent_precision,
        watch,
        config.pilot_pieces or 1,
    )
    return record, teacher, step


def imitation_of(config: RunConfig) -> Imitation:
    """What the student of this configuration imitates."""
    return Imitation(
        config.alpha,
        config.temperature,
        losses.OBJECTIVES[config.objective],
        config.pkd_weight or 0.0,
        config.pkd_layers or "skip",
        config.pkd_normalisation or "sum",
    )


def feedback_data(config: RunConfig, data: glue.TaskData, encoded: dict[str, Encoded]) -> Encoded | None:
    """What the teacher gets its feedback from, if it does: the split carved out of the training set, as a rule."""
    if config.method not in FEEDBACK:
        return encoded.get(config.exam)  # an exam of "train" or "feedback"; nothing for the course itself
    if config.feedback_from is None:
        return encoded["feedback"]
    leaking = encoded[next(iter(data.evaluation))]
    # Rows are numbered within their split; these must not be taken for rows of the training set.
    return dataclasses.replace(leaking, rows=-1 - leaking.rows)


def watched_batch(split: str, encoded: dict[str, Encoded], accelerator: Accelerator) -> Batch:
    """The first rows of a split as one batch."""
    rows = range(min(WATCHED, len(encoded[split])))
    return trainer.training_batch(encoded[split], list(rows), accelerator.device)


def _finish(
    config: RunConfig,
    data: glue.TaskData,
    encoded: dict[str, Encoded],
    student: Learner,
    tokenizer: PreTrainedTokenizerBase,
    result: trainer.Result,
    teacher: RunRecord | None,
) -> RunRecord:
    """Evaluate the best student, write everything, the record last: it is the mark of a finished run."""
    network, autocast = student.module, student.accelerator.autocast
    labelled = [n for n in (*data.evaluation, *data.test) if not (encoded[n].labels == glue.HIDDEN).any()]
    wanted = {*labelled, *(data.test if config.predict_test else ())}
    if has_oracle(config, data):
        wanted.add("train")
    outputs = {
        name: models.predict(network, encoded[name], description=f"predicting {name}", autocast=autocast)
        for name in encoded
        if name in wanted
    }
    values: dict[str, float] = {}
    for name in labelled:
        scores = metrics.compute(data.task.metrics, outputs[name], encoded[name].labels.numpy())
        values |= {f"{name}/{metric}": value for metric, value in scores.items()}
    # The teacher that is left in the folder is the one after the last step.
    last = result.history.iloc[-1]
    told = [name for name in result.history if name.startswith("teacher/") and not name.endswith(f"/{trainer.LOSS}")]
    values |= {name: float(last[name]) for name in told}
    if config.predict_test:
        for name in data.test:
            glue.write_predictions(config.folder, data.task, outputs[name], name)
    save_pretrained(network, tokenizer, config.folder / STUDENT)
    record = RunRecord(
        run_id=config.run_id,
        config=dataclasses.asdict(config),
        metrics=values,
        best_step=result.best_step,
        history=result.history.to_dict("records"),
        seconds=round(result.seconds, 1),
        samples={name: len(split) for name, split in encoded.items()},
        parameters=sum(p.numel() for p in network.parameters()),
        teacher=None if teacher is None else teacher.run_id,
        oracle=compare_with_oracle(data, outputs) if has_oracle(config, data) else {},
        environment=environment(student.accelerator.device),
        git_commit=git_commit(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        contents=contents(config),
        unknown={name: round(split.unknown, 4) for name, split in encoded.items() if split.unknown},
        notes=list(data.notes),
        folder=config.folder,
    )
    write_record(record)
    for leftover in (trainer.CHECKPOINT, trainer.BEST):
        (config.folder / leftover).unlink(missing_ok=True)
    return record


def has_oracle(config: RunConfig, data: glue.TaskData) -> bool:
    """Whether the true posterior and the planted errors are known: of MiniGLUE's classes, not of own data."""
    return config.source == "miniglue" and config.text_columns is None and not data.task.is_regression


def compare_with_oracle(data: glue.TaskData, outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """How the outputs compare with MiniGLUE's true posterior.

    * `<split>/kl`: mean KL(p* ‖ p), in nats, on validation and test;
    * `train/flipped_given`, `train/flipped_clean`: on the training examples with a planted wrong label, the share for
      which the network predicts that wrong label, and the share for which it predicts the label before flipping.
    """
    values = {}
    for name, split in {**data.evaluation, **data.test}.items():
        posterior = np.array(split["posterior"])
        log_p = log_softmax(outputs[name], axis=1)
        values[f"{name}/kl"] = float((posterior * (np.log(np.clip(posterior, 1e-12, 1)) - log_p)).sum(1).mean())
    flipped = np.array(data.train["flipped"])
    predicted = outputs["train"].argmax(1)
    for name, column in (("given", data.task.label_column), ("clean", "clean_label")):
        values[f"train/flipped_{name}"] = float((predicted == np.array(data.train[column]))[flipped].mean())
    return values


def save_pretrained(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a folder for `from_pretrained`, complete or not at all."""
    with files.written(folder) as temporary, models.quiet():
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def write_record(record: RunRecord) -> None:
    """Write `record.json` atomically."""
    fields = {name: value for name, value in vars(record).items() if name != "folder"}
    path = record.folder / RECORD
    files.write_text(path, json.dumps(fields, indent=1) + "\n")


def read_record(folder: Path | str) -> RunRecord:
    """Read a run's record from its folder, or from a record file.

    Raises ValueError that names the file if it is damaged.
    """
    path = Path(folder)
    path = path / RECORD if path.is_dir() else path
    try:
        return RunRecord(**json.loads(path.read_text()), folder=path.parent)
    except (ValueError, TypeError, IsADirectoryError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise ValueError(f"{path} is not a complete run record ({error}): delete it and run again") from error


ROWS = "training_rows"
"""The column of `results` that says on how many rows a student trained."""


def results(folder: Path | str, by: typing.Sequence[str] | None = None) -> pd.DataFrame:
    """Read all records below `folder` into one table: mean, standard deviation and n over seeds.

    Records are grouped by the configuration fields `by`; None takes task, method and every other field that differs
    between records, seeds aside.  Runs that trained on different numbers of rows, as they do where some methods keep
    some for feedback, are never put together: there is a column training_rows then.  The result has these fields
    as columns, then metric, mean, std (with n − 1; NaN for one seed) and n.  An empty folder gives an empty table.
    """
    records = [read_record(path) for path in sorted(Path(folder).rglob("*.json")) if is_record(path)]
    if not records:
        return pd.DataFrame(columns=["task", "method", "metric", "mean", "std", "n"])
    configs = pd.DataFrame([record.config | {ROWS: record.samples.get("train")} for record in records])
    if by is None:
        ignored = {"seed", *_NOT_IDENTITY}
        differing = [c for c in configs if c not in ignored and configs[c].nunique(dropna=False) > 1]
        by = [*dict.fromkeys(["task", "method", *differing])]
    elif configs[ROWS].nunique(dropna=False) > 1:
        by = [*by, ROWS]
    rows = [
        {**{name: config.get(name) for name in by}, "metric": metric, "value": value}
        for record, config in zip(records, configs.to_dict("records"), strict=True)
        for metric, value in {**record.metrics, **{f"oracle/{k}": v for k, v in record.oracle.items()}}.items()
    ]
    table = pd.DataFrame(rows).groupby([*by, "metric"], dropna=False, sort=True)["value"]
    return table.agg(mean="mean", std="std", n="count").reset_index()


def book_records(chapter: str) -> list[RunRecord]:
    """The committed records that a chapter reads, `data/runs/<chapter>/*.json`, in the order of their names.

    Raises FileNotFoundError in an installation without the repository's data.
    """
    folder = Path(kdlib.__file__).resolve().parents[1] / "data" / "runs" / chapter
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no run records in {folder}: `make experiments` writes them")
    return [read_record(path) for path in paths]


def book_choices(chapter: str) -> pd.DataFrame:
    """What was tried before a chapter's records were made, `data/choices/<chapter>.csv`: a row for each setting.

    Columns: the settings, then mean and std (fractions) of the validation accuracy over the seeds that choose, and
    their count; for teachers that learn also the teacher's mean accuracy.

    Raises FileNotFoundError in an installation without the repository's data.
    """
    path = Path(kdlib.__file__).resolve().parents[1] / "data" / "choices" / f"{chapter}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"no table of choices {path}: `python -m tools.experiments --choose {chapter}` writes it"
        )
    return pd.read_csv(path)


def is_record(path: Path) -> bool:
    """Whether a file holds a `RunRecord`; a chapter may keep records of its own form beside them."""
    return path.name == RECORD or (path.suffix == ".json" and '"run_id"' in path.read_text()[:40])


def published(task: str | None = None, folder: Path | str | None = None) -> pd.DataFrame:
    """The papers' printed results, one number a row; only those of `task` if it is given.

    Columns: paper, table, split, method, student, task, metric, value (a string, as printed), teacher, setting.  Read
    from `data/published/`; an installation without the repository has none and gets an empty table.
    """
    where = Path(folder) if folder is not None else Path(kdlib.__file__).parents[1] / "data" / "published"
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in sorted(where.glob("*.csv"))]
    if not tables:
        return pd.DataFrame(columns=["paper", "table", "split", "method", "student", "task", "metric", "value"])
    table = pd.concat(tables, ignore_index=True)
    return table if task is None else table[table["task"] == task].reset_index(drop=True)


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers of a run can depend on besides its configuration: versions, processor, threads, device."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy")
    return {
        "kdlib": kdlib.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The processor's model: two models with the same instructions may still round sums differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the repository that kdlib is imported from, with "+" if files differ; None outside a repository."""
    git = ["git", "-C", str(Path(kdlib.__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
