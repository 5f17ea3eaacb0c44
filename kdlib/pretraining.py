"""Task-agnostic distillation as a run: a validated configuration in, a folder with a record and a student out.

    config = pretraining.configure(method="tutor", teacher="book-mlm", student="tiny-2x64h4", steps=300)
    record = pretraining.run(config)
    runs.run(runs.configure(task="mini-mnli", method="fine_tune", student=str(record.folder / "student")))

A student is distilled from a masked language model on text without labels, then fine-tuned like any other network.
Folders, records and resuming are those of `kdlib.engine`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib import checkpoints, corpus, engine, models, processes, representations, trainer
from kdlib.batches import Encoded, sequential_batches
from kdlib.engine import STUDENT, Findings, Prepared, forget, name_of, save_pretrained, sizes
from kdlib.learner import (
    BATCH_SIZE,
    WARMUP_RATIO,
    WEIGHT_DECAY,
    Batch,
    Learner,
    accelerator_for,
    learner,
)
from kdlib.methods import ON_TEXT
from kdlib.methods.base import Step
from kdlib.methods.on_text import AskingForWords, OnText, Student, TextCast, depth, untrained
from kdlib.methods.tutor import Tutor, TutorKD
from kdlib.progress import notice
from kdlib.records import NOT_IDENTITY, RunRecord
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
    read_by,
    refuse,
    said,
    settings,
    unknown,
    unread,
)
from kdlib.trackers import Tracker

TUTOR_WEIGHTS = "tutor.safetensors"
MAX_NAME = 100
"""Characters of a corpus's name, which names folders."""


@settings
class PretrainingConfig:
    """What all such runs depend on.  Make one with `configure`, which checks it and fills in what is None."""

    corpus: Name = corpus.MINI
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
    max_length: Size = 128
    """word pieces of a block at most"""
    max_lines: Rows | None = None
    """read so many lines only"""
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """share of a block's word pieces that are masked"""
    method: Annotated[str, among(ON_TEXT)] = "tutor"
    """"mlm" (no teacher), "soft_labels", "distilbert", "tinybert", "minilm", "minilm_v2", "untutored", "tutor\""""
    teacher: Name | None = None
    """a masked language model: "book-mlm", "minilm", "tiny-…", a hub id or a folder; None: "book-mlm\""""
    student: Name | None = None
    """"tiny-…", one of the paper's "tutor-66m", "tutor-14m", "tutor-9m", "tutor-5.7m", a hub id or a folder; None:
    tiny-2x64h4, unless student_layers is given"""
    student_layers: Layers | None = None
    """instead of a student: cut the teacher after so many layers"""
    steps: Steps = 300
    """optimiser steps"""
    batch_size: Size = BATCH_SIZE
    """blocks of a step"""
    learning_rate: Rate = by_rule()
    """the highest, after the warm-up; None: 1e-3 for tiny students, as chapter 9 chose for Tutor-KD; 5e-4 for others"""
    warmup_ratio: Share = WARMUP_RATIO
    """share of the steps in which the learning rate rises; it falls linearly afterwards"""
    weight_decay: Weight = WEIGHT_DECAY
    """of AdamW, on matrices only"""
    max_grad_norm: Positive = 1.0
    """longer gradients are scaled down"""
    seed: Seed = 0
    """of the initial weights, the order of the data, the masks, dropout and the tutor's draws"""
    evaluate_every: Steps = by_rule()
    """steps between evaluations; None: a tenth of the steps"""
    checkpoint_every: Steps | None = None
    """steps between checkpoints; None: at each evaluation"""
    max_seconds: Positive | None = None
    """stop after so long with a checkpoint; the same command goes on from it"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"fp32" or "bf16\""""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto", "cpu" or "cuda\""""
    output_dir: Name = "_runs"
    """the folder that holds all runs"""
    cache_dir: Name | None = None
    """where the tokenised corpus is kept; None: output_dir/corpora"""
    resume: bool = True
    """go on with an interrupted run and reuse a finished one; False: start afresh"""
    log_with: Tracker | None = None
    """who follows the history while it grows, on this machine: "tensorboard", "trackio" or "wandb\""""
    settings: Any = None
    """what the method alone reads, an object of its class in `ON_TEXT`"""

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
        return {**own, **{name: None for name in READ_BY if name not in own}, **self.settings.flat}

    @property
    def identity(self) -> dict[str, Any]:
        """The parameters that decide the result and have a meaning for the method."""
        return {n: value for n, value in self.flat.items() if n not in NOT_IDENTITY and value is not None}

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
        return self._named({**self.identity, **self.contents})

    def _named(self, identity: dict[str, Any]) -> str:
        stem = re.sub(r"[^\w.-]+", "-", Path(self.corpus).stem)[-MAX_NAME:]
        return name_of(f"{stem}-{self.method}-seed{self.seed}", identity)

    @property
    def contents(self) -> dict[str, str]:
        """What text and networks from outside are, by content, in place of their paths; {} for the book's own."""
        found = {}
        splits = f"{self.train_split}+{self.validation_split}" if self.validation_split else self.train_split
        if (content := corpus.content(self.corpus, splits, self.column)) is not None:
            found["corpus"] = content
        for who in ("teacher", "student"):
            name = getattr(self, who)
            if name is not None and (content := models.content(name)) is not None:
                found[who] = content
        return found

    @property
    def folder(self) -> Path:
        """Where this run keeps its record, checkpoint and student."""
        return Path(self.output_dir).expanduser() / self.run_id


_VALIDATION = "validation"
READ_BY = read_by(PretrainingConfig, ON_TEXT)
"""The methods that read a field, for those that not all of them read."""


def configure(**parameters: Any) -> PretrainingConfig:
    """Check `parameters`, fill in the defaults that depend on others, and return the configuration.

    What the method does not read is refused, so that two configurations that compute the same are equal and none means
    something else than it says.  None says nothing.

    Raises ConfigurationError with one message that lists all problems and, for names, the nearest valid ones.
    """
    problems = unknown(parameters, PretrainingConfig, ON_TEXT)
    given, wrong = checked(PretrainingConfig, said(parameters, PretrainingConfig))
    assert given is not None
    kind = ON_TEXT[given.method]
    told = {name: value for name, value in parameters.items() if name in READ_BY and value is not None}
    own, more = checked(kind, said(told, kind))
    problems += wrong + more + unread(told, given.method, READ_BY) + _problems(given, kind)
    if own is not None:
        problems += own.problems(given)
    refuse(problems)
    student = given.student
    if student is None and given.student_layers is None:
        student = "tiny-2x64h4"
    teacher = None if kind.teaches == "nobody" else given.teacher or models.BOOK_MASKED
    tiny = models.is_small(student or teacher or "")
    mini = given.corpus == corpus.MINI and given.validation_split == _VALIDATION
    return dataclasses.replace(
        given,
        student=student,
        teacher=teacher,
        learning_rate=given.learning_rate or (1e-3 if tiny else 5e-4),
        evaluate_every=given.evaluate_every or max(1, given.steps // 10),
        validation_split=None if mini else given.validation_split,
        settings=own,
    )


ALONE = ("corpus", "steps")
"""Parameters that a run on plain text has and one on a task has not."""


def is_text(parameters: Mapping[str, Any]) -> bool:
    """Whether these are the parameters of a run on plain text, by their method or by what only such a run has."""
    return parameters.get("method") in ON_TEXT or any(name in parameters for name in ALONE)


def readable(parameters: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Those of the parameters that `method` reads: for a grid whose methods share settings."""
    return {name: value for name, value in parameters.items() if method in READ_BY.get(name, (method,))}


def _problems(given: PretrainingConfig, kind: type[OnText]) -> list[str]:
    """What does not go together in any method."""
    problems = models.name_problems(given.teacher, given.student)
    if given.student is not None and given.student_layers is not None:
        problems.append("student and student_layers are both given; give one")
    if given.corpus == corpus.MINI and given.column != "text":
        problems.append(f"column is {given.column!r}, which the corpus {corpus.MINI!r} does not read: leave it out")
    small = models.is_small(given.teacher or models.BOOK_MASKED)
    if given.corpus != corpus.MINI and kind.teaches != "nobody" and small:
        problems.append(
            f"corpus {given.corpus!r} needs a pretrained teacher: small networks read MiniGLUE's vocabulary only. "
            "Give teacher a folder (a masked language model), or a hub id"
        )
    return problems


@dataclass(frozen=True)
class Networks:
    """Who takes part, what they do with a batch, and what is measured on held-out text."""

    cast: TextCast
    step: Step
    measure: Callable[[Batch], dict[str, float]]

    @property
    def learners(self) -> list[Learner]:
        """Those who learn, the student first."""
        return [self.cast.student] if self.cast.tutor is None else [self.cast.student, self.cast.tutor]


def run(config: PretrainingConfig) -> RunRecord:
    """Compute a run, or return its record if it is finished already.

    The folder then holds `record.json` and the student as a folder for `from_pretrained`: a masked language model where
    the method has trained its head, else the encoder; with a tutor also its weights.  An interrupted run goes on from
    its checkpoint and ends as it would have.  A run that another process computes is waited for; started by torchrun or
    accelerate on several processes, they compute it together, see `kdlib.processes`.

    Raises what corpus, models and trainer raise, before any work is done where that is possible;
    `trainer.TrainingInterruptedError` when `max_seconds` are over.
    """
    processes.join(config.device)
    if not config.resume:
        forget(config.folder)
        notice(f"resume is False: {config.run_id} starts afresh")
    return engine.run(config, lambda: prepare(config))


def prepare(config: PretrainingConfig) -> Prepared:
    """Load and check everything that a run needs, and put its step together."""
    accelerator = accelerator_for(config.device, config.precision)
    tokenizer = models.load_tokenizer(config.reader)
    masking = corpus.masking(tokenizer, config.mask_rate, config.seed)
    who = networks(config, tokenizer, masking, accelerator)
    # After the networks: it may take hours.  The first process fills the cache, where the others find the text.
    text, held_out = processes.first_alone(lambda: load_corpus(config, tokenizer))
    # An epoch's last batch may be small, so the number of epochs is generous and the steps decide.
    epochs = math.ceil(config.steps * config.batch_size / max(1, len(text.encoded))) + 1
    training = trainer.Training(
        step=who.step,
        learners=who.learners,
        data=text.encoded,
        schedule=trainer.Schedule(
            epochs, config.batch_size, config.steps, config.evaluate_every, config.checkpoint_every, config.seed
        ),
        evaluate=evaluation(config, who, held_out, tokenizer),
        prepare=masking,
    )
    return Prepared(training, lambda result: _finish(config, who.cast, text, held_out, tokenizer, result))


def load_corpus(config: PretrainingConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[corpus.Corpus, Encoded]:
    """The training text and the held-out blocks.

    Raises ValueError for a corpus that is too small to hold anything out, and what `corpus.load` raises.
    """
    cache = Path(config.cache_dir or Path(config.output_dir) / "corpora").expanduser()

    def read(split: str, max_lines: int | None = None) -> corpus.Corpus:
        return corpus.load(
            config.corpus,
            tokenizer,
            split,
            config.max_length,
            config.packed,
            max_lines,
            config.column,
            cache,
        )

    text = read(config.train_split, config.max_lines)
    split = config.validation_split or (_VALIDATION if config.corpus == corpus.MINI else None)
    if split is not None:
        return text, read(split).encoded
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

    def learned(name: str, module: nn.Module, steps: int) -> Learner:
        rates = config.learning_rate, steps, config.weight_decay, config.warmup_ratio, config.max_grad_norm
        return learner(name, module, accelerator, *rates)

    words = masking.special, masking.mask
    if config.teacher is None:
        network = models.load_masked(config.reader, tokenizer, config.seed)
        _check_length(config, network)
        if config.settings.trained == "head":
            network.base_model.requires_grad_(False)
        cast = TextCast(learned("student", network, config.steps), None, None, *words)
    else:
        teacher, network = _load_pair(config, tokenizer)
        teacher.to(accelerator.device)
        student = learned("student", Student(network, teacher.config.hidden_size, config.seed), config.steps)
        maker = None
        if isinstance(config.settings, TutorKD):
            turns = 2 if config.settings.order == "in turns" else 1
            maker = learned("tutor", Tutor(teacher, config.settings.tutor_start, config.seed), config.steps * turns)
        cast = TextCast(student, teacher, maker, *words)
    return Networks(cast, config.settings.step(cast), config.settings.measure(cast))


def _load_pair(
    config: PretrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student, which fit together."""
    teacher = models.load_masked(config.reader, tokenizer, config.seed).requires_grad_(False)
    asks = isinstance(config.settings, AskingForWords) and not config.settings.untrained_teacher
    refuse([untrained(config.teacher, config.method)] if asks and models.head_is_new(teacher) else [])
    if config.student_layers is not None:
        network = models.first_layers(teacher, config.student_layers, config.seed).requires_grad_()
    else:
        network = models.load_masked(config.student or config.reader, tokenizer, config.seed)
    _check_words(config, tokenizer, teacher, network)
    for one in (teacher, network):
        _check_length(config, one)
    if config.settings.pairs_layers:
        representations.layer_map(depth(network), depth(teacher))
    config.settings.check(network, teacher)
    return teacher, network


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
) -> trainer.Evaluate:
    """A function that returns what the method minimises, on the held-out blocks, always with the same masks and draws.

    With a tutor these are the numbers of `tutor.Turn.log`.
    """
    masking = corpus.masking(tokenizer, config.mask_rate, seed=0)
    student = who.cast.student
    device = student.accelerator.device
    batches = sequential_batches(held_out.lengths, 4 * config.batch_size)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rows, sizes = [], []
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            models.evaluating(student.module),
            student.accelerator.autocast(),
        ):
            torch.manual_seed(0)
            for number, indices in enumerate(batches):
                batch = masking(trainer.training_batch(held_out, indices, device), number)
                rows.append(who.measure(batch))
                sizes.append(int(batch["masked"].sum()))
        return {f"validation/{name}": float(np.average([row[name] for row in rows], weights=sizes)) for name in rows[0]}

    return evaluate


def _finish(
    config: PretrainingConfig,
    cast: TextCast,
    text: corpus.Corpus,
    held_out: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    result: trainer.Result,
) -> Findings:
    """Write the student, with its head if that was trained, and the tutor."""
    network = cast.student.module if cast.teacher is None else cast.student.module.network
    kept = network if config.settings.trains_head else network.base_model
    kept.requires_grad_(True)
    save_pretrained(kept, tokenizer, config.folder / STUDENT)
    if cast.tutor is not None:
        weights = checkpoints.module_tensors(cast.tutor.module)
        processes.once(lambda: checkpoints.write_tensors(config.folder / TUTOR_WEIGHTS, weights))
    counts = {f"train/{name}": count for name, count in text.counts.items()}
    return Findings(
        metrics=result.best_metrics,
        samples={"train": len(text.encoded), "validation": len(held_out), **counts},
        **sizes(network.base_model, config.folder / STUDENT),
    )
