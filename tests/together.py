"""Steps of every method, to be made by one process and by several: what `tests/test_processes.py` compares."""

import copy
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import coverage
import torch
from transformers import BertConfig, BertForMaskedLM

import kdlib.learner
from kdlib import __main__, corpus, glue, models, processes
from kdlib.learner import Learner, NonFiniteLossError, accelerator_for, learner
from kdlib.methods.annealing import AnnealingKD
from kdlib.methods.base import Cast
from kdlib.methods.ikd import IKD
from kdlib.methods.kd import DIST, KD, PKD, SKD, FineTune
from kdlib.methods.lgtm import LGTM, RELEASED
from kdlib.methods.metadistil import MetaDistil
from kdlib.methods.on_text import OnText, Student, TextCast
from kdlib.methods.online import DML, ProKT
from kdlib.methods.pesf import PESFKD
from kdlib.methods.rco import RCO
from kdlib.methods.takd import TAKD
from kdlib.methods.task_agnostic import MLM, DistilBERT, MiniLM, MiniLMv2, SoftLabels, TinyBERT
from kdlib.methods.theseus import Theseus
from kdlib.methods.tinybert_task import TinyBERTOnTask
from kdlib.methods.tutor import Tutor, TutorKD, Untutored
from tests import exact, quick

SIZES = (5, 1, 4)
"""Samples of a batch: an uneven cut, fewer than processes, and one that 2 divides and 3 does not."""
FEEDBACK = (3, 7, 1)
PATIENT = {"pkd_weight": 0.7}

ON_TASKS = {
    "fine_tune": FineTune(),
    "kd": KD(alpha=0.3, **PATIENT),
    "kd, dist": KD(objective="dist"),
    "pkd": PKD(),
    "dist": DIST(alpha=0.2),
    "skd": SKD(),
    "takd": TAKD(),
    "rco": RCO(anchors=1),
    "annealing": AnnealingKD(max_temperature=2),
    "theseus": Theseus(replacing_rate=0.5),
    "tinybert_task": TinyBERTOnTask(),
    "pesf": PESFKD(adapter_size=6, **PATIENT),
    "prokt": ProKT(first="teacher", **PATIENT),
    "prokt, student first, dist": ProKT(first="student", objective="dist", teacher_objective="kl"),
    "dml": DML(teacher_alpha=0.8),
    "metadistil": MetaDistil(),
    "metadistil, adamw, pkd, pieces": MetaDistil(pilot_rule="adamw", pilot_pieces=2, **PATIENT),
    "metadistil, two inner steps": MetaDistil(inner_steps=2, objective="dist", **PATIENT),
    "metadistil, observed, no pilot update": MetaDistil(observe=True, pilot_update=False, tangent="finite-difference"),
    "ikd": IKD(**PATIENT),
    "ikd, after, feedback": IKD(feedback_at="after", exam="feedback", objective="dist"),
    "ikd, no labels": IKD(labelled_course=False, tangent="double-backward"),
    "lgtm": LGTM(objective="dist", teacher_objective="kl"),
    "lgtm, meta, shared": LGTM(influence="meta", influence_share=0.5, feedback_layers=1, **PATIENT),
    "lgtm, forward difference, observed": LGTM(influence="printed", tangent="forward-difference", observe=True),
    "lgtm, released": RELEASED,
    "lgtm, every second step": LGTM(feedback_every=2, influence_weight="student_rate"),
}
ON_TEXT = {
    "mlm": MLM(),
    "mlm, head": MLM(trained="head"),
    "soft_labels": SoftLabels(temperature=2.0),
    "distilbert": DistilBERT(),
    "tinybert": TinyBERT(),
    "minilm": MiniLM(),
    "minilm_v2": MiniLMv2(relation_heads=2),
    "untutored": Untutored(),
    "tutor": TutorKD(baseline="running mean"),
    "tutor, samples, in turns": TutorKD(samples=2, baseline="leave one out", order="in turns", everywhere=True),
    "tutor, distribution": TutorKD(samples=2, imitated="distribution", attention=False),
    "tutor, nothing inside": TutorKD(inner_weight=0.0, temperature=2.0),
}
CASES = {**ON_TASKS, **ON_TEXT}
COUNTS = "KDLIB_COUNTS"
"""Names the file beside which a child leaves its counts of lines, in the environment."""
ON_THREE = [
    "fine_tune",
    "metadistil, two inner steps",
    "ikd, after, feedback",
    "lgtm, meta, shared",
    "minilm_v2",
    "tutor",
]
"""Every way of sharing the rows of a batch, for a cut that does not come out even."""


def batches(sizes: tuple[int, ...], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    for number, size in enumerate(sizes):
        batch = exact.batch(size, seed + number)
        yield batch | {"positions": torch.arange(size)}


def on_task(settings) -> tuple[list[Learner], Callable[[], Iterator[dict[str, float]]]]:
    networks = exact.bert(0, 2, 0.0), exact.bert(1, 4 if isinstance(settings, Theseus) else 3, 0.0)
    settings.prepare(*networks)
    student, teacher = (
        learner(name, one.double(), accelerator_for("cpu"), 1e-2, 100, warmup_ratio=0.0)
        for name, one in zip(("student", "teacher"), networks, strict=True)
    )

    def answers(batch: dict[str, torch.Tensor]) -> models.Outputs:
        return models.targets(teacher.module, batch, **settings.wanted)

    step = settings.step(Cast(student, teacher, answers, held_out, teacher.module, [answers], len(SIZES)))

    def steps() -> Iterator[dict[str, float]]:
        for batch, feedback in zip(batches(SIZES, 10), batches(FEEDBACK, 20), strict=True):
            yield step(*([batch] if settings.feedback is None else [batch, feedback]))

    return [student, teacher], steps


def held_out(rows: int) -> dict[str, torch.Tensor]:
    return exact.batch(6, 30)


WORDS, SPECIAL, MASK = 24, (0, 1, 2, 3), 3


def masked_network(seed: int, layers: int, width: int, trained: bool = True) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.4,
    )
    torch.manual_seed(seed)
    return BertForMaskedLM(config).double().requires_grad_(trained)


def sentences(size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (size, 1), generator=generator)
    real = torch.arange(10) < lengths
    words = torch.randint(4, WORDS, (size, 10), generator=generator).masked_fill(~real, 0)
    words[:, 0] = 1
    words[-1, 1:] = words[-1, 1:].clamp(max=0)  # a sentence without words: where it is alone, nothing is masked
    if size == 1:
        words[0, 1:5] = torch.randint(4, WORDS, (4,), generator=generator)
    batch = {"input_ids": words, "attention_mask": real.long(), "labels": torch.zeros(size), "rows": torch.arange(size)}
    return corpus.Masking(SPECIAL, MASK, WORDS, 0.4)(batch, seed)


def on_text(settings: OnText) -> tuple[list[Learner], Callable[[], Iterator[dict[str, float]]]]:
    width = 12 if isinstance(settings, DistilBERT) else 8
    network, accelerator = masked_network(1, 2, width), accelerator_for("cpu")

    def learned(name: str, module: torch.nn.Module) -> Learner:
        return learner(name, module.double(), accelerator, 1e-2, 100, warmup_ratio=0.0)

    teacher, maker = None, None
    if isinstance(settings, MLM):
        if settings.trained == "head":
            network.base_model.requires_grad_(False)
        student = learned("student", network)
    else:
        teacher = masked_network(0, 4, 12, trained=False).eval()
        student = learned("student", Student(network, 12, seed=2))
        maker = learned("tutor", Tutor(teacher, "random", seed=3)) if isinstance(settings, TutorKD) else None
    cast = TextCast(student, teacher, maker, SPECIAL, MASK)
    step, measure = settings.step(cast), settings.measure(cast)

    def steps() -> Iterator[dict[str, float]]:
        torch.manual_seed(4 + processes.rank())  # whoever draws by himself is found out
        for number, size in enumerate(SIZES):
            batch = sentences(size, 40 + number)
            with torch.no_grad():
                measured = measure(sentences(3, 50 + number))
            yield step(batch) | {f"held out {name}": value for name, value in measured.items()}

    return [one for one in (student, maker) if one is not None], steps


def made(case: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """How everybody's weights change in the steps of a case, and what the steps returned."""
    learners, steps = (on_task if case in ON_TASKS else on_text)(CASES[case])
    for group in (group for who in learners for group in who.optimizer.param_groups):
        group["eps"] = 1e-2  # AdamW would make steps out of gradients that are zero but for rounding
    before = {who.name: copy.deepcopy(who.module.state_dict()) for who in learners}
    logged = [*steps()]
    changes = {
        f"{who.name}/{name}": value.detach() - before[who.name][name]
        for who in learners
        for name, value in who.module.state_dict().items()
    }
    return changes, logged


@contextmanager
def measured(wanted: bool = True) -> Iterator[None]:
    """Count the lines that this process runs, if the tests that started it count theirs: see `test_processes.py`."""
    counts = None
    if wanted and COUNTS in os.environ:
        counts = coverage.Coverage(data_file=os.environ[COUNTS], data_suffix=True)  # pytest-cov combines them
        counts.start()
    try:
        yield
    finally:
        if counts is not None:
            counts.stop()
            counts.save()


def enter(number: int, size: int, port: int) -> None:
    """Be process `number` of so many, as torchrun would have it."""
    torch.set_num_threads(1)
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")


def make_all(number: int, size: int, port: int, folder: str, cases: list[str]) -> None:
    """In one of several processes: make these cases, say a few words, and leave what came of them in a file."""
    enter(number, size, port)
    with measured(len(cases) < len(CASES)):
        processes.join("cpu")
        torch.save({case: made(case) for case in cases} | {"words": words(number)}, Path(folder) / f"{number}.pt")
        processes.leave()


def words(number: int) -> dict[str, Any]:
    """What this process hears of the others."""
    processes.HEARTBEAT = 0.05

    def fail() -> None:
        raise NonFiniteLossError("student", float("nan"), 1.0, [number])

    def error_of(work: Callable[[], Any]) -> str:
        try:
            return str(work())
        except (RuntimeError, FloatingPointError) as error:
            return f"{type(error).__name__}: {error}"

    return {
        "once": processes.once(lambda: time.sleep(0.3) or f"by {number}"),
        "failure": error_of(lambda: processes.once(fail)),
        "first alone": processes.first_alone(lambda: f"by {number}"),
        "anybody": (processes.anybody(number == 1), processes.anybody(False)),
        "told": processes.told(number),
        "equal": error_of(lambda: processes.check_equal({"same": 1, "number": number})),
        "from first": processes.from_first(torch.tensor([number, 7])).tolist(),
        "rows": processes.by_rows(lambda rows: (rows, rows > 2), torch.arange(5, dtype=torch.bfloat16)),
    }


def run(number: int, size: int, port: int, folder: str, place: tuple[int, int, int] | None, given: list[str]) -> None:
    """In one of several processes: the command line, what it prints into a file; `place` is the process that gets a
    signal, at which of a learner's gradients, before it is added up, and the signal."""
    enter(number, size, port)
    glue.load = quick.few_to_test(glue.load)
    if place is not None and place[0] == number:
        calls, original = itertools.count(1), kdlib.learner.add_up

        def deadly(module: torch.nn.Module) -> None:
            if next(calls) == place[1]:
                os.kill(os.getpid(), place[2])
            original(module)

        kdlib.learner.add_up = deadly
    told = Path(folder) / f"{number}.txt"
    with measured(place is not None), open(told, "w") as file, redirect_stderr(file), redirect_stdout(file):
        status = __main__.main(["run", *given])
    sys.exit(status)
