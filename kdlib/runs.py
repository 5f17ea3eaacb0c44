"""A run on a task: a validated configuration in, a folder with a record, a student and predictions out.

    config = runs.configure(task="mini-sst2", method="kd", temperature=2)
    record = runs.run(config)

Every run has a folder of its own below `output_dir`, named after what it computes.  A finished run is not computed
again.  The teacher is a run too, so runs that need the same teacher share it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from scipy.special import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib import checkpoints, engine, glue, metrics, models, processes, trainer
from kdlib.batches import Encoded
from kdlib.configuration import RunConfig, configure, load_data, readable, teachers_config
from kdlib.engine import STUDENT, TEACHER_FOLDER, Findings, Prepared, forget, save_pretrained, sizes
from kdlib.learner import Batch, Learner, accelerator_for, learner
from kdlib.methods.base import Cast, Learning, Trained, untrained
from kdlib.models import Outputs
from kdlib.progress import notice
from kdlib.records import RunRecord, read_record, results
from kdlib.settings import refuse

__all__ = ["RunConfig", "RunRecord", "configure", "load_data", "read_record", "readable", "results", "run"]


def run(config: RunConfig) -> RunRecord:
    """Compute a run, or return its record if it is finished already.

    The folder then holds `record.json`, the student as a folder for `from_pretrained`, and GLUE-format predictions of
    the test split.  An interrupted run goes on from its checkpoint.  A run that another process computes is waited for.

    Started by torchrun or accelerate on several processes, they compute it together: the numbers of one process but for
    rounding and dropout's masks, see `kdlib.processes`.

    Raises what data, models and trainer raise; before any work is done where that is possible.  Raises
    `trainer.TrainingInterruptedError` when `max_seconds` are over or somebody asked the process to end.
    """
    processes.join(config.device)
    config = afresh(config)
    return engine.run(config, lambda: prepare(config))


def afresh(config: RunConfig) -> RunConfig:
    """Where `resume` is False: forget what is left of this run and of its teacher's, say so, and let resuming begin.

    Several runs that follow each other can so share what the first of them computes anew.
    """
    if config.resume:
        return config
    left = [config]
    while (teacher := teachers_config(left[-1])) is not None:
        left.append(teacher)
    for each in left:
        forget(each.folder)
    notice(f"resume is False: {' and '.join(each.run_id for each in left)} start afresh")
    return dataclasses.replace(config, resume=True)


def prepare(config: RunConfig) -> Prepared:
    """Load and check everything that a run needs, its teacher's own run included, and put its step together."""
    accelerator = accelerator_for(config.device, config.precision)
    data = load_data(config)
    tokenizer = models.load_tokenizer(config.reader)
    network = load_student(config, data.task, tokenizer)
    encoded = encode_all(data, tokenizer, config.max_length)
    check_lengths(encoded, network, config.student or f"the student of {config.student_layers} layers")
    # Without labels elsewhere, fine-tuning has the feedback split alone.
    alone = config.settings.teaches == "nobody"
    course = encoded["feedback" if alone and config.settings.carves else "train"]
    total = _schedule(config).total_steps(len(course))
    config.settings.check_steps(total)
    teacher, record = (None, None) if alone else load_teacher(config, data.task, tokenizer, network, encoded)
    if teacher is not None:
        config.settings.prepare(network, teacher, config.seed)
    student = _learner("student", network, config, accelerator, len(course))
    cast = _cast(config, student, teacher, record, encoded, next(iter(data.evaluation)))
    learners = [student] if cast.teacher is None else [student, cast.teacher]
    evaluated = {name: encoded[name] for name in data.evaluation}
    training = trainer.Training(
        step=config.settings.step(cast),
        learners=learners,
        data=course,
        schedule=_schedule(config),
        evaluate=trainer.evaluation(student, data.task, evaluated, others=learners[1:]),
        select=f"{next(iter(data.evaluation))}/{data.task.metrics[0]}",
        select_after=config.settings.unfinished(total),
        feedback=_feedback(config, data, encoded),
        feedback_batch_size=getattr(config.settings, "feedback_batch_size", None),
        anchors=getattr(config.settings, "anchors", 0) if alone else 0,
    )

    def finish(result: trainer.Result) -> Findings:
        if cast.teacher is not None:
            _save_teacher(cast.teacher, tokenizer, config.folder)
        config.settings.release(student.module)
        return _finish(config, data, encoded, student, tokenizer, result, record)

    return Prepared(training, finish)


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
    network = models.load(named or config.reader, task, tokenizer, config.seed)
    if config.student_layers is None:
        return network
    return models.first_layers(network, config.student_layers, config.seed)


def load_teacher(
    config: RunConfig,
    task: glue.Task,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    encoded: Mapping[str, Encoded],
) -> tuple[PreTrainedModel, RunRecord | None]:
    """The teacher's network, fine-tuned if need be, and the record of that run (None if it was fine-tuned elsewhere).

    Raises ConfigurationError for a head that was never trained where it must know the task; ValueError if it does not
    fit its student or the data.
    """
    own = teachers_config(config)
    shape = models.shape_of(config.reader if own is None else own.student or own.reader, tokenizer, task)
    shape.num_hidden_layers = (own and own.student_layers) or shape.num_hidden_layers
    config.settings.check_shapes(student.config, shape)
    where, record = teacher_of(config)
    # What the fine-tuning drew has made another head; a teacher that starts untrained has a seed of its own.
    network = models.load(where, task, tokenizer, config.settings.teacher_seed)
    models.check_pair(network, student)
    check_lengths(encoded, network, f"teacher {config.teacher!r}")
    if record is None and models.head_is_new(network) and isinstance(config.settings, Trained):
        refuse([] if config.settings.untrained_teacher else [untrained(config.teacher, config.method)])
    return network, record


def teacher_of(config: RunConfig) -> tuple[str, RunRecord | None]:
    """Where the teacher of `config` is, made if need be, and the record of its run (None if it was there already)."""
    own = teachers_config(config)
    if own is None:
        return config.reader, None
    record = run(own)
    needed = [record.folder / STUDENT / "config.json"]
    needed += [record.folder / f"{trainer.ANCHOR}{n}.safetensors" for n in range(getattr(own.settings, "anchors", 0))]
    if not processes.once(lambda: all(path.exists() for path in needed)):
        notice(f"a network of the finished run {record.run_id} is gone: it is computed again")
        forget(record.folder)
        record = run(own)
    return str(record.folder / STUDENT), record


def _cast(
    config: RunConfig,
    student: Learner,
    teacher: PreTrainedModel | None,
    record: RunRecord | None,
    encoded: Mapping[str, Encoded],
    held_out: str,
) -> Cast:
    """Who takes part: a teacher that learns becomes a learner, one that does not answers once for all if it can."""
    accelerator, settings = student.accelerator, config.settings

    def first_rows(count: int) -> Batch:
        rows = range(min(count, len(encoded[held_out])))
        return trainer.training_batch(encoded[held_out], list(rows), accelerator.device)

    cast = Cast(student, total=_schedule(config).total_steps(len(encoded["train"])), seed=config.seed)
    if teacher is None:
        return cast
    if isinstance(settings, Learning):
        learning = _learner("teacher", teacher, config, accelerator, len(encoded["train"]))
        return dataclasses.replace(cast, teacher=learning, held_out=first_rows)
    teacher.to(accelerator.device)

    def answers_of(network: PreTrainedModel) -> Callable[[Batch], Outputs]:
        if settings.wanted:  # hidden states of a whole training set are too many to keep
            return lambda batch: models.targets(network, batch, **settings.wanted)
        cache = None if record is None else record.folder
        looked_up = trainer.teacher_logits(network, encoded["train"], accelerator, cache=cache)
        return lambda batch: Outputs(looked_up(batch))

    if settings.asks == "network":
        return dataclasses.replace(cast, network=teacher)
    if settings.asks == "route":
        assert record is not None
        anchors = trainer.anchors(record.folder, settings.anchors - 1, teacher)
        return dataclasses.replace(cast, route=[answers_of(network) for network in (*anchors, teacher)])
    return dataclasses.replace(cast, answers=answers_of(teacher))


def _save_teacher(teacher: Learner, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What has learned of a teacher: a folder for `from_pretrained`, or the weights of the part that did."""
    if all(parameter.requires_grad for parameter in teacher.module.parameters()):
        return save_pretrained(teacher.module, tokenizer, folder / TEACHER_FOLDER)
    learned = {name: value.contiguous() for name, value in models.trainable(teacher.module).items()}
    return processes.once(lambda: checkpoints.write_tensors(folder / engine.ADAPTER, learned))


def check_lengths(encoded: Mapping[str, Encoded], network: PreTrainedModel, name: str) -> None:
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
        config.learning_rate if name == "student" else config.settings.teaching_rate,
        _schedule(config).total_steps(samples),
        config.weight_decay,
        config.warmup_ratio,
        1.0 if config.max_grad_norm is None else config.max_grad_norm,
        config.micro_batches,
        config.settings.stages,
    )


def _feedback(config: RunConfig, data: glue.TaskData, encoded: Mapping[str, Encoded]) -> Encoded | None:
    """Where a step's second batch comes from, if it has one: the split carved out of the training set, as a rule."""
    split = config.settings.feedback
    if split != "validation":
        return None if split is None else encoded[split]
    leaking = encoded[next(iter(data.evaluation))]
    # Rows are numbered within their split; these must not be taken for rows of the training set.
    return dataclasses.replace(leaking, rows=-1 - leaking.rows)


def _finish(
    config: RunConfig,
    data: glue.TaskData,
    encoded: Mapping[str, Encoded],
    student: Learner,
    tokenizer: PreTrainedTokenizerBase,
    result: trainer.Result,
    teacher: RunRecord | None,
) -> Findings:
    """Evaluate the best student, write its network and predictions."""
    network, autocast = student.module, student.accelerator.autocast
    labelled = [n for n in (*data.evaluation, *data.test) if not (encoded[n].labels == glue.HIDDEN).any()]
    wanted = {*labelled, *(data.test if config.predict_test else ())} | (
        {"train"} if has_oracle(config, data) else set()
    )
    outputs = {
        name: models.predict(network, split, description=f"predicting {name}", autocast=autocast)
        for name, split in encoded.items()
        if name in wanted
    }
    values: dict[str, float] = {}
    for name in labelled:
        scores = metrics.compute(data.task.metrics, outputs[name], encoded[name].labels.numpy())
        values |= {f"{name}/{metric}": value for metric, value in scores.items()}
    # The teacher that is left in the folder is the one after the last step.
    last = result.history.iloc[-1]
    of_teacher = [n for n in result.history if n.startswith("teacher/") and not n.endswith(f"/{trainer.LOSS}")]
    values |= {name: float(last[name]) for name in of_teacher}
    for name in data.test if config.predict_test else ():
        processes.once(partial(glue.write_predictions, config.folder, data.task, outputs[name], name))
    save_pretrained(network, tokenizer, config.folder / STUDENT)
    return Findings(
        metrics=values,
        samples={name: len(split) for name, split in encoded.items()},
        **sizes(network, config.folder / STUDENT),
        teacher=None if teacher is None else teacher.run_id,
        oracle=compare_with_oracle(data, outputs) if has_oracle(config, data) else {},
        unknown={name: round(split.unknown, 4) for name, split in encoded.items() if split.unknown},
        notes=list(data.notes),
    )


def has_oracle(config: RunConfig, data: glue.TaskData) -> bool:
    """Whether the true posterior and the planted errors are known: of MiniGLUE's classes, not of own data."""
    return config.source == "miniglue" and config.text_columns is None and not data.task.is_regression


def compare_with_oracle(data: glue.TaskData, outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """How the outputs compare with MiniGLUE's true posterior.

    * `<split>/kl`: mean KL(p* ‖ p), in nats, on validation and test;
    * `train/flipped_given`, `train/flipped_clean`: on the training examples with a planted wrong label, the share for
      which the network predicts that wrong label, and the share for which it predicts the label before flipping; not
      there if a small training set has no such example.
    """
    values = {}
    for name, split in {**data.evaluation, **data.test}.items():
        posterior = np.array(split["posterior"])
        log_p = log_softmax(outputs[name], axis=1)
        values[f"{name}/kl"] = float((posterior * (np.log(np.clip(posterior, 1e-12, 1)) - log_p)).sum(1).mean())
    flipped = np.array(data.train["flipped"])
    if not flipped.any():
        return values
    predicted = outputs["train"].argmax(1)
    for name, column in (("given", data.task.label_column), ("clean", "clean_label")):
        values[f"train/flipped_{name}"] = float((predicted == np.array(data.train[column]))[flipped].mean())
    return values
