"""Every rule of teaching with everything that can be imitated: what learns moves, what is fixed stays."""

import math
from typing import get_args

import pytest
import torch

from kdlib import losses, models
from kdlib.batches import collate
from kdlib.learner import accelerator_for, learner
from kdlib.methods import kd
from kdlib.methods.ikd import IKD, ikd
from kdlib.methods.lgtm import LGTM, Variant, lgtm
from kdlib.methods.metadistil import MetaDistil, metadistil
from kdlib.methods.online import Order, ProKT, online_distillation
from tests import toy

INFLUENCES = {f"lgtm {variant}": variant for variant in get_args(Variant)}
RULES = ["kd", *get_args(Order), "metadistil", "ikd", *INFLUENCES]
PAPERS = {"influence_weight": 1.0, "pilot_rule": "sgd"}  # also for what is otherwise as released
OUTPUTS = {"two-way": 2, "three-way": 3, "regression": 1}
WEIGHTS = (0.0, 0.7)
# Every rule with every objective, for two ways and three, with hidden states and without them in turns.
PAIRS = [
    (rule, objective, WEIGHTS[(row + column) % 2], ("two-way", "three-way")[(row + column) % 2])
    for row, rule in enumerate(RULES)
    for column, objective in enumerate(losses.OBJECTIVES)
]
PAIRS += [
    (rule, objective, WEIGHTS[row % 2], "regression")
    for row, rule in enumerate(RULES)
    for objective in losses.REGRESSION_OBJECTIVES
]


def batch(seed: int, task: str) -> dict[str, torch.Tensor]:
    collated = collate(toy.encoded(4, seed), range(4))
    generator = torch.Generator().manual_seed(seed)
    if task == "regression":
        return collated | {"labels": 5 * torch.rand(4, generator=generator)}
    return collated | {"labels": torch.randint(0, OUTPUTS[task], (4,), generator=generator)}


def learners(task: str):
    """Without weight decay, so that only a gradient moves anything."""
    options = {"learning_rate": 1e-3, "total_steps": 10, "warmup_ratio": 0.0, "weight_decay": 0.0}
    accelerator = accelerator_for("cpu")
    return [
        learner(name, toy.network(seed, OUTPUTS[task], layers=2).train(), accelerator, **options)
        for seed, name in enumerate(("student", "teacher"))
    ]


def step_of(rule: str, student, teacher, **imitated):
    if rule == "kd":
        settings = kd.KD(alpha=0.4, **imitated)
        return kd.distillation(student, lambda data: models.targets(teacher.module, data, **settings.wanted), settings)
    if rule == "metadistil":
        return metadistil(student, teacher, MetaDistil(alpha=0.4, **imitated))
    if rule == "ikd":
        return ikd(student, teacher, IKD(alpha=0.4, **imitated))
    both = {"alpha": 0.4, "teacher_alpha": 0.5, **imitated}
    if rule in INFLUENCES:
        return lgtm(student, teacher, LGTM(influence=INFLUENCES[rule], **both, **PAPERS))
    return online_distillation(student, teacher, ProKT(first=rule, **both))


def asks_for_feedback(rule: str) -> bool:
    return rule == "metadistil" or rule in INFLUENCES


def weights(who) -> list[torch.Tensor]:
    return [value.clone() for value in models.trainable(who.module).values()]


def moved(who, before: list[torch.Tensor]) -> bool:
    now = weights(who)
    assert all(value.isfinite().all() for value in now)
    return any(not torch.equal(ours, theirs) for ours, theirs in zip(now, before, strict=True))


@pytest.mark.parametrize(("rule", "objective", "pkd_weight", "task"), PAIRS)
def test_two_steps(rule, objective, pkd_weight, task):
    student, teacher = learners(task)
    step = step_of(rule, student, teacher, objective=objective, pkd_weight=pkd_weight)
    before = weights(student), weights(teacher)
    for number in range(2):
        data = [batch(number, task)] + ([batch(number + 2, task)] if asks_for_feedback(rule) else [])
        values = step(*data)
        assert "loss" in values and all(math.isfinite(value) for value in values.values()), values
    assert moved(student, before[0])
    assert moved(teacher, before[1]) == (rule != "kd")


@pytest.mark.parametrize("rule", RULES)
def test_a_softmax_over_one_output_is_refused_before_anything_moves(rule):
    student, teacher = learners("regression")
    step = step_of(rule, student, teacher)
    before = weights(student), weights(teacher)
    with pytest.raises(ValueError, match="for regression use objective 'logit_mse'"):
        step(*[batch(0, "regression")] * (2 if asks_for_feedback(rule) else 1))
    assert not moved(student, before[0]) and not moved(teacher, before[1])
