"""One step of online distillation, in each order, against the same step in plain torch."""

import copy

import pytest
import torch
from kdlib.imitation import Imitation
from torch import nn
from torch.nn import functional as F

from kdlib import losses, models
from kdlib.methods.online import ORDERS, detached, online_distillation, zero_classifier
from tests import exact, toy

BATCH = exact.batch(7, 0)
OURS, THEIRS = Imitation(0.3, 2.0), Imitation(0.6, 3.0)


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


def plain_loss(module, example, imitation, distance):
    own = models.outputs(module, BATCH, hidden_states=True)
    hard = F.cross_entropy(own.logits, BATCH["labels"])
    soft = distance(own.logits, example.logits, imitation.temperature).mean()
    loss = imitation.alpha * hard + (1 - imitation.alpha) * soft
    if imitation.pkd_weight:
        layer = 2 if imitation.pkd_layers == "last" else 1
        loss = loss + imitation.pkd_weight * first_tokens(own.hidden_states[1], example.hidden_states[layer]).mean()
    return loss


def in_plain_torch(student, teacher, order, imitation, teacher_distance):
    ours, theirs = exact.twin(student), exact.twin(teacher)

    def answer(module):
        with torch.no_grad():
            return models.outputs(module, BATCH, hidden_states=True)

    known = answer(ours[0]), answer(theirs[0])
    values = {}

    def teacher_step(example):
        values["teacher_loss"] = plain_loss(theirs[0], example, THEIRS, teacher_distance)
        values["teacher_loss"].backward()
        exact.descend(*theirs)

    def student_step(example):
        values["loss"] = plain_loss(ours[0], example, imitation, kl)
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
    ("imitation", "objective", "distance"),
    [
        (OURS, losses.kl_divergence, kl),
        (Imitation(0.3, 2.0, pkd_weight=0.5), losses.kl_divergence, kl),
        (Imitation(0.3, 2.0, pkd_weight=0.5, pkd_layers="last"), losses.reverse_soft_cross_entropy, as_printed),
    ],
    ids=["kl", "patient", "as printed"],
)
def test_step_is_that_of_plain_torch(order, imitation, objective, distance):
    """Catches a swapped order, exchanged roles in KL, a target that is not a constant.  The moments are not zero."""
    student, teacher = exact.learners()
    step = online_distillation(student, teacher, imitation, Imitation(0.6, 3.0, objective), order)
    step(exact.batch(7, 1))
    ours, theirs, numbers = in_plain_torch(student, teacher, order, imitation, distance)
    assert step(BATCH) == pytest.approx(numbers, rel=1e-6)  # entropies are taken in float32
    assert exact.error(models.trainable(student.module), models.trainable(ours)) < 1e-9
    assert exact.error(models.trainable(teacher.module), models.trainable(theirs)) < 1e-9


def test_orders_differ():
    ends = []
    for order in ORDERS:
        learners = exact.learners()
        online_distillation(*learners, OURS, THEIRS, order)(BATCH)
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
    online_distillation(student, teacher, Imitation(0.3, 2.0, kept), Imitation(0.6, 3.0, kept), order)(BATCH)
    expected["last"] = models.targets({"teacher": teacher, "student": student}[order].module, BATCH).logits
    asked_first = {"teacher": "student", "student": "teacher"}[order]
    torch.testing.assert_close(examples, [expected[asked_first], expected["last"]], rtol=1e-12, atol=1e-12)
    assert student.module.training and teacher.module.training
    assert not any(example.requires_grad for example in examples)


def test_at_once_both_run_once_and_each_learns_from_what_the_other_said_in_that_run():
    """With dropout, so that a second question would have another answer."""
    learners, asked, seen = exact.learners(dropout=0.5), [], []
    for who in learners:
        who.module.train().register_forward_hook(
            lambda *what, name=who.name: asked.append((name, what[-1].logits.detach()))
        )

    def kept(own, example, temperature, reduction):
        seen.append((own.detach(), example))
        return losses.kl_divergence(own, example, temperature, reduction=reduction)

    online_distillation(*learners, Imitation(0.3, 2.0, kept), Imitation(0.6, 3.0, kept), "simultaneous")(BATCH)
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
        step = online_distillation(*learners, Imitation(0.3, 2.0, pkd_weight=0.5), THEIRS, order)
        ends.append(([step(BATCH), step(BATCH)][1], [models.trainable(who.module) for who in learners]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert exact.error(ends[0][1], ends[1][1]) < 1e-9


def test_with_the_labels_alone_the_order_does_not_matter():
    ends = []
    for order in ORDERS:
        learners = exact.learners()
        online_distillation(*learners, Imitation(1.0), Imitation(1.0), order)(BATCH)
        ends.append([models.trainable(who.module) for who in learners])
    assert exact.error(ends[0], ends[1]) < 1e-14 and exact.error(ends[0], ends[2]) < 1e-14


def test_unknown_orders_and_hidden_states_for_the_teacher_are_refused():
    learners = exact.learners()
    with pytest.raises(ValueError, match="first is 'both'; expected one of teacher, student, simultaneous"):
        online_distillation(*learners, OURS, THEIRS, "both")
    with pytest.raises(ValueError, match="give pkd_weight to the student's imitation"):
        online_distillation(*learners, OURS, Imitation(pkd_weight=1.0))


def test_a_zero_classifier_gives_equal_probabilities_and_only_the_head_changes():
    module = toy.network(0, labels=3)
    nn.init.ones_(module.classifier.bias)
    before = copy.deepcopy(module.state_dict())
    zero_classifier(module)
    assert torch.equal(models.targets(module, BATCH).logits, torch.zeros(7, 3))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="Sequential has no linear layer called classifier"):
        zero_classifier(nn.Sequential(nn.Linear(2, 2)))


def test_detached_outputs_are_constants():
    outputs = detached(models.outputs(toy.network(0, labels=3).train(), BATCH, hidden_states=True))
    assert not outputs.logits.requires_grad and len(outputs.hidden_states) == 2
    assert not any(states.requires_grad for states in outputs.hidden_states)
