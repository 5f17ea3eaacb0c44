"""One step of online distillation, in each order, against the same step in plain torch."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from kdlib import losses, models
from kdlib.methods.online import DML, Order, ProKT, online_distillation
from kdlib.settings import checked
from tests import exact

BATCH = exact.batch(7, 0)
ORDERS = get_args(Order)
BOTH = {"alpha": 0.3, "teacher_alpha": 0.6}
PATIENT = {"pkd_weight": 0.5}


def kl(own, example, temperature):
    """T² KL(example ‖ own): the one who learns is the model, the one who is imitated the truth."""
    own, example = (F.log_softmax(logits / temperature, dim=-1) for logits in (own, example))
    return temperature**2 * F.kl_div(own, example, reduction="none", log_target=True).sum(-1)


def as_printed(own, example, temperature):
    """LGTM eq. (3): the cross entropy of the teacher who learns, under the teacher's own predictions."""
    total = 0.0
    for c in range(exact.CLASSES):
        total = total - (own / temperature).softmax(-1)[:, c] * (example / temperature).log_softmax(-1)[:, c]
    return temperature**2 * total


def first_tokens(ours, theirs):
    """Layer 1 of two learns from layer 1 of three (skip), or from layer 2 (last)."""
    ours, theirs = (states[:, 0] / states[:, 0].norm(dim=-1, keepdim=True) for states in (ours, theirs))
    return (ours - theirs).square().sum(-1)


def plain_loss(module, example, alpha, distance, patient=None):
    own = models.outputs(module, BATCH, hidden_states=True)
    hard = F.cross_entropy(own.logits, BATCH["labels"])
    loss = alpha * hard + (1 - alpha) * distance(own.logits, example.logits, 3.0).mean()
    if patient:
        layer = 2 if patient.get("pkd_layers") == "last" else 1
        loss = loss + patient["pkd_weight"] * first_tokens(own.hidden_states[1], example.hidden_states[layer]).mean()
    return loss


def in_plain_torch(student, teacher, order, patient, teacher_distance):
    ours, theirs = exact.twin(student), exact.twin(teacher)

    def answer(module):
        with torch.no_grad():
            return models.outputs(module, BATCH, hidden_states=True)

    known = answer(ours[0]), answer(theirs[0])
    values = {}

    def teacher_step(example):
        values["teacher_loss"] = plain_loss(theirs[0], example, 0.6, teacher_distance)
        values["teacher_loss"].backward()
        exact.descend(*theirs)

    def student_step(example):
        values["loss"] = plain_loss(ours[0], example, 0.3, kl, patient)
        values["loss"].backward()
        exact.descend(*ours)

    if order == "teacher":
        teacher_step(known[0])
        student_step(answer(theirs[0]))
    elif order == "student":
        student_step(known[1])
        teacher_step(answer(ours[0]))
    else:
        student_step(known[1])
        teacher_step(known[0])
    for name, outputs in zip(("student_entropy", "teacher_entropy"), known, strict=True):
        values[name] = torch.distributions.Categorical(logits=outputs.logits).entropy().mean()
    return ours[0], theirs[0], {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("patient", "objective", "distance"),
    [
        ({}, "kl", kl),
        (PATIENT, "kl", kl),
        (PATIENT | {"pkd_layers": "last"}, "reverse_soft_cross_entropy", as_printed),
    ],
    ids=["kl", "patient", "as printed"],
)
def test_step_is_that_of_plain_torch(order, patient, objective, distance):
    """Catches a swapped order, exchanged roles in KL, a target that is not a constant.  The moments are not zero."""
    student, teacher = exact.learners()
    settings = ProKT(**BOTH, **patient, temperature=3.0, teacher_objective=objective, first=order)
    step = online_distillation(student, teacher, settings)
    step(exact.batch(7, 1))
    ours, theirs, numbers = in_plain_torch(student, teacher, order, patient, distance)
    assert step(BATCH) == pytest.approx(numbers, rel=1e-6)  # entropies are taken in float32
    assert exact.error(models.trainable(student.module), models.trainable(ours)) < 1e-9
    assert exact.error(models.trainable(teacher.module), models.trainable(theirs)) < 1e-9


def test_orders_differ():
    ends = []
    for order in ORDERS:
        learners = exact.learners()
        online_distillation(*learners, ProKT(**BOTH, first=order))(BATCH)
        ends.append([models.trainable(who.module) for who in learners])
    by_order = dict(zip(ORDERS, ends, strict=True))
    assert exact.error(by_order["teacher"][1], by_order["simultaneous"][1]) < 1e-14
    assert exact.error(by_order["student"][0], by_order["simultaneous"][0]) < 1e-14
    assert exact.error(by_order["teacher"][0], by_order["student"][0]) > 1e-6
    assert exact.error(by_order["teacher"][1], by_order["student"][1]) > 1e-6


@pytest.mark.parametrize("order", ["teacher", "student"])
def test_who_is_only_asked_is_asked_without_dropout(order, monkeypatch):
    student, teacher = exact.learners(dropout=0.5)
    student.module.train(), teacher.module.train()
    examples = []

    def kept(ours, theirs, temperature, reduction):
        examples.append(theirs)
        return losses.kl_divergence(ours, theirs, temperature, reduction=reduction)

    expected = {who.name: models.targets(who.module, BATCH).logits for who in (student, teacher)}
    monkeypatch.setitem(losses.OBJECTIVES, "kl", kept)
    monkeypatch.setitem(losses.TEACHER_OBJECTIVES, "kl", kept)
    online_distillation(student, teacher, ProKT(**BOTH, first=order))(BATCH)
    expected["last"] = models.targets({"teacher": teacher, "student": student}[order].module, BATCH).logits
    asked_first = {"teacher": "student", "student": "teacher"}[order]
    torch.testing.assert_close(examples, [expected[asked_first], expected["last"]], rtol=1e-12, atol=1e-12)
    assert student.module.training and teacher.module.training
    assert not any(example.requires_grad for example in examples)


def test_at_once_both_run_once_and_each_learns_from_what_the_other_said_in_that_run(monkeypatch):
    """With dropout, so that a second question would have another answer."""
    learners, asked, seen = exact.learners(dropout=0.5), [], []
    for who in learners:
        who.module.train().register_forward_hook(
            lambda *what, name=who.name: asked.append((name, what[-1].logits.detach()))
        )

    def kept(own, example, temperature, reduction):
        seen.append((own.detach(), example))
        return losses.kl_divergence(own, example, temperature, reduction=reduction)

    monkeypatch.setitem(losses.OBJECTIVES, "kl", kept)
    monkeypatch.setitem(losses.TEACHER_OBJECTIVES, "kl", kept)
    online_distillation(*learners, ProKT(**BOTH, first="simultaneous"))(BATCH)
    assert [name for name, _ in asked] == ["student", "teacher"]
    (ours, theirs), ((own, example), (their_own, their_example)) = [logits for _, logits in asked], seen
    assert torch.equal(own, ours) and torch.equal(example, theirs)
    assert torch.equal(their_own, theirs) and torch.equal(their_example, ours)
    assert not example.requires_grad and not their_example.requires_grad


@pytest.mark.parametrize("order", ORDERS)
def test_pieces_of_a_batch_give_the_step_of_the_whole(order):
    ends = []
    for pieces in (1, 3):
        learners = exact.learners(micro_batches=pieces)
        step = online_distillation(*learners, ProKT(**BOTH, **PATIENT, first=order))
        ends.append(([step(BATCH), step(BATCH)][1], [models.trainable(who.module) for who in learners]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert exact.error(ends[0][1], ends[1][1]) < 1e-9


def test_with_the_labels_alone_the_order_does_not_matter():
    ends = []
    for order in ORDERS:
        learners = exact.learners()
        online_distillation(*learners, ProKT(alpha=1.0, first=order))(BATCH)
        ends.append([models.trainable(who.module) for who in learners])
    assert exact.error(ends[0], ends[1]) < 1e-14 and exact.error(ends[0], ends[2]) < 1e-14


def test_unknown_orders_are_refused():
    with pytest.raises(ValidationError):
        ProKT(first="both")
    expected = "first is 'both'; expected one of teacher, student, simultaneous"
    assert checked(ProKT, {"first": "both"})[1] == [expected]


def test_mutual_learning_is_the_simultaneous_order_at_temperature_one():
    ends = []
    for settings in (DML(**BOTH), ProKT(**BOTH, temperature=1.0, first="simultaneous")):
        learners = exact.learners()
        online_distillation(*learners, settings)(BATCH)
        ends.append([models.trainable(who.module) for who in learners])
    assert exact.error(*ends) == 0
