"""Task-agnostic distillation as a run: a validated configuration in, a folder with a record and a student out.

    config = pretraining.configure(method="tutor", teacher="book-mlm", student="tiny-2x64h4", steps=300)
    record = pretraining.run(config)
    runs.run(runs.configure(task="mini-mnli", method="fine_tune", student=str(record.folder / "student")))

A student is distilled from a masked language model on text without labels, then fine-tuned like any other network.
Folders, records and resuming are those of `kdlib.runs`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib import checkpoints, corpus, models, representations, runs, trainer
from kdlib.batches import Encoded, sequential_batches
from kdlib.learner import Learner, accelerator_for, learner, refuse_many_processes
from kdlib.methods import Step, task_agnostic, tutor
from kdlib.methods.task_agnostic import Loss
from kdlib.methods.tutor import Settings, Student, Tutor
from kdlib.progress import notice
from kdlib.runs import STUDENT, RunRecord

TUTOR_WEIGHTS = "tutor.safetensors"
METHODS = ("mlm", "soft_labels", "distilbert", "tinybert", "minilm", "minilm_v2", "untutored", "tutor")
"""Masked language modelling without a teacher, the baselines of the paper, Tutor-KD without and with its tutor."""
OF_TUTOR = tuple(field.name for field in dataclasses.fields(Settings))


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Everything such a run depends on.  Make one with `configure`, which checks it and fills in what is None."""

    corpus: str = corpus.MINI
    """"mini-corpus" (embedded), a .txt file, a local folder, or a hub id, several joined by +"""
    column: str = "text"
    """the column that holds the text, where there are columns"""
    train_split: str = "train"
    """the split to learn from, several joined by +"""
    validation_split: str | None = None
    """the split to evaluate on; None: "validation" of the mini-corpus, elsewhere the last 5 % of the training blocks,
    1,000 at most"""
    packed: bool = False
    """join lines to blocks of max_length word pieces, instead of a line a block"""
    max_length: int = 128
    """word pieces of a block at most"""
    max_lines: int | None = None
    """read so many lines only"""
    mask_rate: float = 0.15
    """share of a block's word pieces that are masked"""
    method: str = "tutor"
    """"mlm" (no teacher), "soft_labels", "distilbert", "tinybert", "minilm", "minilm_v2", "untutored", "tutor\""""
    teacher: str | None = None
    """a masked language model: "book-mlm", "minilm", "tiny-…", a hub id or a folder; None: "book-mlm\""""
    student: str | None = None
    """"tiny-…", one of the paper's "tutor-66m", "tutor-14m", "tutor-9m", "tutor-5.7m", a hub id or a folder; None:
    tiny-2x64h4, unless student_layers is given"""
    student_layers: int | None = None
    """instead of a student: cut the teacher after so many layers"""
    untrained_teacher: bool | None = None
    """soft_labels, distilbert, untutored, tutor: True: a teacher whose masked-language-model head was never trained may
    be asked for words all the same; None: it is refused"""
    trained: str | None = None
    """mlm: what learns, "all" or only the "head", for an encoder that comes without one; None: "all\""""
    steps: int = 300
    """optimiser steps"""
    batch_size: int = 32
    """blocks of a step"""
    learning_rate: float | None = None
    """the highest, after the warm-up; None: 1e-3 for tiny students, as chapter 9 chose for Tutor-KD; 5e-4 for others"""
    warmup_ratio: float = 0.1
    """share of the steps in which the learning rate rises; it falls linearly afterwards"""
    weight_decay: float = 0.01
    """of AdamW, on matrices only"""
    max_grad_norm: float = 1.0
    """longer gradients are scaled down"""
    temperature: float | None = None
    """soft_labels, distilbert: of both distributions, None: 1 and 2; tutor: τ of eq. (11), None: 1"""
    relation_heads: int | None = None
    """minilm_v2: None: 12, for tiny students their own"""
    attention: bool | None = None
    """tutor, untutored, tinybert: imitate attention too; None: where the numbers of heads agree"""
    logit_weight: float | None = None
    """tutor, untutored: λ₁ of eq. (8); None: 25"""
    inner_weight: float | None = None
    """tutor, untutored: λ₂ of eq. (8); None: 0.5"""
    reward_weight: float | None = None
    """tutor: λ of eq. (2), the weight of r_T; None: 0.5"""
    strategy: str | None = None
    """tutor: "tutor", "reverse", "no reward", "hard for both" or "easy for both"; None: "tutor\""""
    kl_weight: float | None = None
    """tutor: weight of its KL to the teacher; None: 1"""
    samples: int | None = None
    """tutor: words drawn for each position; None: 1"""
    baseline: str | None = None
    """tutor: subtracted from its rewards, "none", "running mean" or "leave one out"; None: "none\""""
    imitated: str | None = None
    """tutor: the teacher's "modified" probability or its whole "distribution"; None: "modified\""""
    everywhere: bool | None = None
    """tutor: the words that were left alone are scored, too, as in the released code; None: False"""
    order: str | None = None
    """tutor: its step and the student's "together" or "in turns"; None: "together\""""
    tutor_start: str | None = None
    """tutor: "teacher", a copy of its head, or "random", as in the released code; None: "teacher\""""
    seed: int = 0
    """of the initial weights, the order of the data, the masks, dropout and the tutor's draws"""
    evaluate_every: int | None = None
    """steps between evaluations; None: a tenth of the steps"""
    checkpoint_every: int | None = None
    """steps between checkpoints; None: at each evaluation"""
    max_seconds: float | None = None
    """stop after so long with a checkpoint; the same command goes on from it"""
    precision: str = "fp32"
    """"fp32" or "bf16\""""
    device: str = "auto"
    """"auto", "cpu" or "cuda\""""
    output_dir: str = "_runs"
    """the folder that holds all runs"""
    cache_dir: str | None = None
    """where the tokenised corpus is kept; None: output_dir/corpora"""
    resume: bool = True
    """go on with an interrupted run and reuse a finished one; False: start afresh"""

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide the result and have a meaning for the method."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _NOT_IDENTITY and value is not None}

    @property
    def asked_id(self) -> str:
        """The name of this run by its parameters alone; nothing is read."""
        return self._named(self.identity)

    @property
    def run_id(self) -> str:
        """A readable, unique name for what this run computes.

        Text and networks of the book count by their names, local text and all other networks by their content (see
        `contents`); text from the hub by its id.

        Raises what `corpus.content` and `models.content` raise.
        """
        return self._named({**self.identity, **contents(self)})

    def _named(self, identity: dict[str, Any]) -> str:
        stem = re.sub(r"[^\w.-]+", "-", Path(self.corpus).stem)[-runs.MAX_NAME :]
        return runs.name_of(f"{stem}-{self.method}-seed{self.seed}", identity)

    @property
    def folder(self) -> Path:
        """Where this run keeps its record, checkpoint and student."""
        return Path(self.output_dir).expanduser() / self.run_id

    @property
    def settings(self) -> Settings:
        """What `methods.tutor` needs to know."""
        values = {name: getattr(self, name) for name in OF_TUTOR}
        return Settings(**{name: value for name, value in values.items() if value is not None})


def contents(config: PretrainingConfig) -> dict[str, str]:
    """What text and networks from outside the package are, by content, in place of their paths; {} for the book's."""
    found = {}
    splits = f"{config.train_split}+{config.validation_split}" if config.validation_split else config.train_split
    if (content := corpus.content(config.corpus, splits, config.column)) is not None:
        found["corpus"] = content
    for who in ("teacher", "student"):
        name = getattr(config, who)
        if name is not None and (content := models.content(name)) is not None:
            found[who] = content
    return found


_VALIDATION = "validation"
_NOT_IDENTITY = ("output_dir", "cache_dir", "resume", "device", "checkpoint_every", "max_seconds")
_USED = {
    "mlm": ("trained",),
    "soft_labels": ("temperature",),
    "distilbert": ("temperature",),
    "tinybert": ("attention",),
    "minilm": (),
    "minilm_v2": ("relation_heads",),
    "untutored": ("attention", "logit_weight", "inner_weight"),
    "tutor": (*OF_TUTOR, "tutor_start"),
}
"""The optional fields that each method reads; the others are None for it."""
_OPTIONAL = {name for names in _USED.values() for name in names}
_POSITIVE: dict[str, float] = {
    **dict.fromkeys(("steps", "evaluate_every", "checkpoint_every"), 10**9),
    **dict.fromkeys(("max_lines",), 10**12),
    **dict.fromkeys(("max_length", "batch_size", "samples"), 10**6),
    **dict.fromkeys(("student_layers", "relation_heads"), 1000),
    **dict.fromkeys(("learning_rate",), 1e3),
    **dict.fromkeys(("temperature", "max_grad_norm", "max_seconds"), 1e9),
}
_AT_LEAST_ZERO: dict[str, float] = {
    "seed": 2**32 - 1,
    **dict.fromkeys(("weight_decay", "logit_weight", "inner_weight", "kl_weight"), 1e6),
}
_HEADED = ("mlm", "soft_labels", "distilbert", "untutored")
"""The methods that leave a student with a trained masked-language-model head."""
_PREDICTING = ("soft_labels", "distilbert", "untutored", "tutor")
"""The methods that ask the teacher for words, not only for what is inside it."""
_LAYERED = ("tinybert", "untutored", "tutor")
"""The methods that pair the student's layers with the teacher's."""
READ_BY: dict[str, tuple[str, ...]] = {
    **{name: tuple(method for method, names in _USED.items() if name in names) for name in _OPTIONAL},
    **dict.fromkeys(("teacher", "student_layers"), tuple(name for name in METHODS if name != "mlm")),
    "untrained_teacher": _PREDICTING,
}
"""The methods that read a field; what is not listed all of them read."""


def configure(**parameters: Any) -> PretrainingConfig:
    """Check `parameters`, fill in the defaults that depend on others, and return the configuration.

    What the method does not read is refused, so that two configurations that compute the same are equal and none means
    something else than it says.

    Raises `runs.ConfigurationError` with one message that lists all problems and, for names, the nearest valid ones.
    """
    known, problems = runs.typed(PretrainingConfig, parameters)
    config = PretrainingConfig(**known)
    choices = {"method": METHODS, "precision": ("fp32", "bf16"), "device": ("auto", "cpu", "cuda")}
    choices |= {"trained": ("all", "head"), "tutor_start": ("teacher", "random")}
    for name, valid in choices.items():
        value = getattr(config, name)
        if value is not None and value not in valid:
            problems.append(f"{name} is {value!r}; expected one of {', '.join(valid)}{runs.nearest(value, valid)}")
    problems += runs.path_problems(config, ("corpus", "output_dir", "cache_dir", "teacher", "student"))
    problems += runs.bound_problems(config, _POSITIVE, _AT_LEAST_ZERO)
    problems += runs.unread_problems(config, config.method, READ_BY, METHODS) + _unread_choices(config)
    if not 0 < config.mask_rate < 1:
        problems.append(f"mask_rate is {config.mask_rate}; expected a share between 0 and 1")
    if not 0 <= config.warmup_ratio <= 1:
        problems.append(f"warmup_ratio is {config.warmup_ratio}; expected a number between 0 and 1")
    if config.student is not None and config.student_layers is not None:
        problems.append("student and student_layers are both given; give one")
    if config.method == "mlm" and config.student is None:
        problems.append("method 'mlm' trains a network of its own: give student")
    if (
        config.corpus != corpus.MINI
        and config.method != "mlm"
        and models.is_small(config.teacher or models.BOOK_MASKED)
    ):
        problems.append(
            f"corpus {config.corpus!r} needs a pretrained teacher: small networks read MiniGLUE's vocabulary only. "
            "Give teacher a folder (a masked language model), or a hub id"
        )
    known_untrained = config.teacher == models.MINILM or models.is_fresh(config.teacher or models.BOOK_MASKED)
    if config.method in _PREDICTING and known_untrained and not config.untrained_teacher:
        problems.append(_untrained(config))
    if config.method == "tutor" and config.temperature is not None and 0 < config.temperature < 1:
        problems.append(f"temperature is {config.temperature}; the tutor's divides probabilities: expected 1 or more")
    try:
        if config.method == "tutor":
            config.settings  # noqa: B018  (its checks)
    except ValueError as error:
        problems.append(str(error))
    runs.refuse(problems)
    return _complete(config)


def readable(parameters: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Those of the parameters that `method` reads: for a grid whose methods share settings."""
    return {name: value for name, value in parameters.items() if method in READ_BY.get(name, METHODS)}


def _unread_choices(config: PretrainingConfig) -> list[str]:
    """Fields that another choice of this configuration leaves without a meaning."""
    plain, problems = Settings(), []
    unread = {
        "imitated 'distribution'": ("temperature",) if config.imitated == "distribution" else (),
        "strategy 'no reward'": ("reward_weight", "baseline") if config.strategy == "no reward" else (),
        f"the corpus {corpus.MINI!r}": ("column",) if config.corpus == corpus.MINI else (),
    }
    for choice, names in unread.items():
        for name in names:
            value, usual = getattr(config, name), getattr(plain, name, "text")
            if value not in (None, usual):
                problems.append(f"{name} is {value!r}, which {choice} does not read: leave it out")
    if config.method in ("tutor", "untutored") and config.inner_weight == 0 and config.attention is not None:
        problems.append(f"attention is {config.attention}, but inner_weight is 0, which leaves it out")
    return problems


def _complete(config: PretrainingConfig) -> PretrainingConfig:
    """Fill in None by rule; reset what the method does not use."""
    filled: dict[str, Any] = dict.fromkeys(_OPTIONAL - set(_USED[config.method]))
    student = config.student
    if student is None and config.student_layers is None:
        student = "tiny-2x64h4"
    tiny = models.is_small(student or config.teacher or models.BOOK_MASKED)
    filled |= {
        "student": student,
        "teacher": None if config.method == "mlm" else config.teacher or models.BOOK_MASKED,
        "learning_rate": config.learning_rate or (1e-3 if tiny else 5e-4),
        "evaluate_every": config.evaluate_every or max(1, config.steps // 10),
    }
    if config.method == "mlm":
        filled |= {"trained": config.trained or "all", "student_layers": None}
    if config.method in ("soft_labels", "distilbert"):
        filled["temperature"] = config.temperature or {"soft_labels": 1.0, "distilbert": 2.0}[config.method]
    if config.method == "tutor":
        filled |= {
            name: value
            for name, value in dataclasses.asdict(config.settings).items()
            if name != "attention" and getattr(config, name) is None
        }
        filled["tutor_start"] = config.tutor_start or "teacher"
        if config.imitated == "distribution":
            filled["temperature"] = 1.0  # it divides modified probabilities only
        if config.strategy == "no reward":
            filled |= {"reward_weight": Settings.reward_weight, "baseline": "none"}
    if config.method == "untutored":
        defaults = Settings()
        for name in ("logit_weight", "inner_weight"):
            filled[name] = getattr(defaults if getattr(config, name) is None else config, name)
    if config.method in ("tutor", "untutored") and filled.get("inner_weight", config.inner_weight) == 0:
        filled["attention"] = None
    if config.corpus == corpus.MINI:
        named = config.validation_split
        filled |= {"column": "text", "validation_split": None if named == _VALIDATION else named}
    return dataclasses.replace(config, **filled)


def _untrained(config: PretrainingConfig) -> str:
    return (
        f"teacher {config.teacher!r} comes without a trained masked-language-model head, and {config.method} asks it "
        "for words: train it first (method 'mlm' with it as the student) and give teacher the folder of that student "
        "(untrained_teacher=True takes it as it is)"
    )


@dataclass(frozen=True)
class Networks:
    """Who takes part: the student, its teacher (None for mlm), its tutor (for tutor only), and what they do.

    `loss` is the student's on a batch; with a tutor there are `settings` in its place.
    """

    student: Learner
    teacher: PreTrainedModel | None
    tutor: Learner | None
    step: Step
    loss: Loss | None = None
    settings: Settings | None = None


def run(config: PretrainingConfig) -> RunRecord:
    """Compute a run, or return its record if it is finished already.

    The folder then holds `record.json` and the student as a folder for `from_pretrained`: a masked language model where
    the method has trained its head, else the encoder; with a tutor also its weights.  An interrupted run goes on from
    its checkpoint and ends as it would have.  A run that another process computes is waited for.

    Raises what corpus, models and trainer raise, before any work is done where that is possible;
    `trainer.TrainingInterruptedError` when `max_seconds` are over.
    """
    refuse_many_processes()
    if not config.resume:
        runs.forget(config.folder)
        notice(f"resume is False: {config.run_id} starts afresh")
    return runs.once(config.folder, lambda: _compute(config))


def _compute(config: PretrainingConfig) -> RunRecord:
    folder = config.folder
    accelerator = accelerator_for(config.device, config.precision)
    tokenizer = models.load_tokenizer(config.teacher or config.student)
    masking = corpus.masking(tokenizer, config.mask_rate, config.seed)
    who = networks(config, tokenizer, masking, accelerator)
    text, held_out = load_corpus(config, tokenizer)  # after the networks: it may take hours
    learners = [who.student] if who.tutor is None else [who.student, who.tutor]
    epochs = math.ceil(config.steps * config.batch_size / max(1, len(text.encoded)))
    result = trainer.train(
        who.step,
        learners,
        text.encoded,
        trainer.Schedule(
            # An epoch's last batch may be small, so the number of epochs is generous and the steps decide.
            epochs + 1,
            config.batch_size,
            config.steps,
            config.evaluate_every,
            config.checkpoint_every,
            config.seed,
        ),
        evaluation(config, who, held_out, tokenizer),
        select=None,
        keep=who.student,
        folder=folder,
        identity={**config.identity, **contents(config)},
        prepare=masking,
        max_seconds=config.max_seconds,
    )
    return _finish(config, who, text, held_out, tokenizer, result)


def load_corpus(config: PretrainingConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[corpus.Corpus, Encoded]:
    """The training text and the held-out blocks.

    Raises ValueError for a corpus that is too small to hold anything out, and what `corpus.load` raises.
    """
    cache = Path(config.cache_dir or Path(config.output_dir) / "corpora").expanduser()
    options = {"max_length": config.max_length, "packed": config.packed, "column": config.column, "cache": cache}
    text = corpus.load(config.corpus, tokenizer, config.train_split, max_lines=config.max_lines, **options)
    split = config.validation_split or (_VALIDATION if config.corpus == corpus.MINI else None)
    if split is not None:
        return text, corpus.load(config.corpus, tokenizer, split, **options).encoded
    blocks = len(text.encoded)
    kept = min(1000, blocks // 20)
    if kept < 1:
        raise ValueError(
            f"the corpus {config.corpus!r} has {blocks} blocks, too few to hold any out: give a larger one, or "
            "validation_split"
        )
    first, rest = (_blocks(text.encoded, *ends) for ends in ((0, blocks - kept), (blocks - kept, blocks)))
    return dataclasses.replace(text, encoded=first), rest


def _blocks(encoded: Encoded, start: int, stop: int) -> Encoded:
    """The blocks `start` … `stop` − 1."""
    left, right = int(encoded.offsets[start]), int(encoded.offsets[stop])
    return dataclasses.replace(
        encoded,
        input_ids=encoded.input_ids[left:right],
        token_type_ids=encoded.token_type_ids[left:right],
        offsets=encoded.offsets[start : stop + 1] - left,
        labels=encoded.labels[start:stop],
        rows=encoded.rows[start:stop],
    )


def networks(
    config: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, masking: corpus.Masking, accelerator: Accelerator
) -> Networks:
    """Load everyone, check that they fit together, and make the step of the configured method.

    Raises ValueError for a teacher and a student with different vocabularies or, where it matters, numbers of heads,
    for a student that is deeper than its teacher, and for blocks that are longer than a network can read.
    """

    def taught(name: str, module: nn.Module, steps: int) -> Learner:
        rates = config.learning_rate, steps, config.weight_decay, config.warmup_ratio, config.max_grad_norm
        return learner(name, module, accelerator, *rates)

    if config.method == "mlm":
        network = models.load_masked(config.student, tokenizer, config.seed)
        _check_length(config, network)
        if config.trained == "head":
            network.base_model.requires_grad_(False)
        loss = task_agnostic.masked_language_model(network)
        student = taught("student", network, config.steps)
        return Networks(student, None, None, task_agnostic.step(student, loss), loss)
    teacher = models.load_masked(config.teacher, tokenizer, config.seed).requires_grad_(False)
    if config.method in _PREDICTING and models.head_is_new(teacher) and not config.untrained_teacher:
        runs.refuse([_untrained(config)])
    if config.student_layers is not None:
        network = models.first_layers(teacher, config.student_layers, config.seed).requires_grad_()
    else:
        network = models.load_masked(config.student, tokenizer, config.seed)
    _check_words(config, tokenizer, teacher, network)
    for one in (teacher, network):
        _check_length(config, one)
    heads, theirs = (one.config.num_attention_heads for one in (network, teacher))
    attention = heads == theirs if config.attention is None else config.attention
    if config.method in _LAYERED and config.inner_weight != 0:
        representations.layer_map(tutor.depth(network), tutor.depth(teacher))
    if (config.method == "minilm" or attention) and heads != theirs:
        remedy = "take minilm_v2, or such a student" if config.method == "minilm" else "leave attention out"
        raise ValueError(
            f"the student has {heads} heads, the teacher {theirs}, and attention is compared head by head: {remedy}"
        )
    teacher.to(accelerator.device)
    module = Student(network, teacher.config.hidden_size, config.seed)
    student = taught("student", module, config.steps)
    if config.method == "tutor":
        settings = dataclasses.replace(config.settings, attention=attention)
        maker = Tutor(teacher, config.tutor_start, config.seed)
        turns = 2 if settings.order == "in turns" else 1
        tutoring = taught("tutor", maker, config.steps * turns)
        step = tutor.tutor_kd(student, tutoring, teacher, masking.special, masking.mask, settings)
        return Networks(student, teacher, tutoring, step, settings=settings)
    if config.method == "untutored":
        settings = Settings(
            logit_weight=config.logit_weight,
            inner_weight=config.inner_weight,
            attention=attention,
            imitated="distribution",
        )
        loss = tutor.untutored(module, teacher, masking.special, masking.mask, settings)
    else:
        loss = _loss(config, module, teacher, attention)
    return Networks(student, teacher, None, task_agnostic.step(student, loss), loss)


def _loss(config: PretrainingConfig, student: Student, teacher: PreTrainedModel, attention: bool) -> Loss:
    """The loss of a baseline.  Raises ValueError for relation heads that do not divide the widths."""
    if config.method in ("soft_labels", "distilbert"):
        return getattr(task_agnostic, config.method)(student, teacher, config.temperature)
    if config.method == "tinybert":
        return task_agnostic.tinybert(student, teacher, attention)
    if config.method == "minilm":
        return task_agnostic.minilm(student, teacher)
    tiny = models.is_small(config.student or config.teacher)
    heads = config.relation_heads or (student.network.config.num_attention_heads if tiny else 12)
    for who, width in (("student", student.network.config.hidden_size), ("teacher", teacher.config.hidden_size)):
        if width % heads:
            raise ValueError(
                f"relation_heads is {heads}, which does not divide the {who}'s width of {width}: give a number that "
                "divides both"
            )
    return task_agnostic.minilm_v2(student, teacher, heads)


def _check_words(
    config: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the student has {ours} word pieces, the teacher {theirs}: distillation on text needs one vocabulary"
        )
    named = config.student
    if named is None or models.is_small(named) or models.is_fresh(named):
        return
    if models.load_tokenizer(named).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"student {named!r} and teacher {config.teacher!r} have different tokenizers: distillation on text needs "
            "one vocabulary"
        )


def _check_length(config: PretrainingConfig, network: PreTrainedModel) -> None:
    longest = models.longest(network)
    if longest is not None and config.max_length > longest:
        raise ValueError(
            f"max_length is {config.max_length}, but {network.name_or_path or 'the network'} reads {longest} word "
            "pieces at most: give a smaller max_length"
        )


def evaluation(
    config: PretrainingConfig, who: Networks, held_out: Encoded, tokenizer: PreTrainedTokenizerBase
) -> Callable[[], dict[str, float]]:
    """A function that returns what the method minimises, on the held-out blocks, always with the same masks and draws.

    With a tutor these are the numbers of `tutor.Turn.log`.
    """
    masking = corpus.masking(tokenizer, config.mask_rate, seed=0)
    accelerator, device = who.student.accelerator, who.student.accelerator.device
    batches = sequential_batches(held_out.lengths, 4 * config.batch_size)

    def measured(batch: dict) -> dict[str, float]:
        if who.loss is not None:
            return {"loss": who.loss(batch).mean().item()}
        modules = who.student.module, who.tutor.module, who.teacher
        turn = tutor.take_turn(*modules, batch, masking.special, masking.mask, who.settings)
        return {"loss": turn.student.item(), **{name: value.item() for name, value in turn.log.items()}}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rows, sizes = [], []
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), models.evaluating(who.student.module), accelerator.autocast():
            torch.manual_seed(0)
            for number, indices in enumerate(batches):
                batch = masking(trainer.training_batch(held_out, indices, device), number)
                rows.append(measured(batch))
                sizes.append(int(batch["masked"].sum()))
        return {f"validation/{name}": float(np.average([row[name] for row in rows], weights=sizes)) for name in rows[0]}

    return evaluate


def _finish(
    config: PretrainingConfig,
    who: Networks,
    text: corpus.Corpus,
    held_out: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    result: trainer.Result,
) -> RunRecord:
    """Write everything, the record last: it is the mark of a finished run."""
    network = who.student.module if who.teacher is None else who.student.module.network
    headed = config.method in _HEADED or config.imitated == "distribution"
    kept = network if headed else network.base_model
    kept.requires_grad_(True)
    runs.save_pretrained(kept, tokenizer, config.folder / STUDENT)
    if who.tutor is not None:
        checkpoints.write_tensors(config.folder / TUTOR_WEIGHTS, checkpoints.module_tensors(who.tutor.module))
    record = RunRecord(
        run_id=config.run_id,
        config=dataclasses.asdict(config),
        metrics=result.best_metrics,
        best_step=result.best_step,
        history=result.history.to_dict("records"),
        seconds=round(result.seconds, 1),
        samples={
            "train": len(text.encoded),
            "validation": len(held_out),
            **{f"train/{k}": v for k, v in text.counts.items()},
        },
        parameters=sum(p.numel() for p in network.base_model.parameters()),
        teacher=None,
        oracle={},
        environment=runs.environment(who.student.accelerator.device),
        git_commit=runs.git_commit(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        contents=contents(config),
        folder=config.folder,
    )
    runs.write_record(record)
    for leftover in (trainer.CHECKPOINT, trainer.BEST):
        (config.folder / leftover).unlink(missing_ok=True)
    return record
