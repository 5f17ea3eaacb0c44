"""One step of MetaDistil against plain automatic differentiation through the written Algorithm 1."""

import copy

import pytest
import torch

from kdlib import losses, models
from kdlib.imitation import Imitation
from kdlib.learner import accelerator_for, learner
from kdlib.methods.metadistil import check_settings, metadistil
from tests import exact

BATCH, QUIZ, WATCHED = (exact.batch(6, seed) for seed in (0, 1, 2))
KL = Imitation(0.3, 2.0)
PATIENT = Imitation(0.0, 3.0, losses.probability_mse, pkd_weight=1.0)
LOGITS = Imitation(0.5, 1.0, losses.logit_mse)


def answers(module, batch=BATCH):
    outputs = models.outputs(module, batch, hidden_states=True)
    return outputs, models.Outputs(outputs.logits.detach(), tuple(state.detach() for state in outputs.hidden_states))


def task_loss(module, parameters, batch):
    logits = torch.func.functional_call(
        module, parameters, kwargs={key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    ).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"])


def adamw(weights, gradients, parameters, optimizer, rate):
    """One AdamW step in terms of its textbook formulas, differentiable in the gradients."""
    stepped = {}
    for (name, value), gradient in zip(weights.items(), gradients, strict=True):
        group = next(g for g in optimizer.param_groups if any(parameters[name] is p for p in g["params"]))
        state, (b1, b2) = optimizer.state[parameters[name]], group["betas"]
        t = float(state.get("step", 0)) + 1
        first = (b1 * state.get("exp_avg", 0) + (1 - b1) * gradient) / (1 - b1**t)
        second = (b2 * state.get("exp_avg_sq", 0) + (1 - b2) * gradient**2) / (1 - b2**t)
        touched = second > 0
        root = torch.where(touched, torch.where(touched, second, 1.0).sqrt(), 0.0)
        stepped[name] = value - rate * group["weight_decay"] * value - rate * first / (root + group["eps"])
    return stepped


def written(student, teacher, imitation, inner_steps=1, pilot_rule="sgd", pilot_update=True, pilot_learning_rate=None):
    """Algorithm 1 with a graph through everything; returns both networks after it, and what a step reports."""
    (ours, our_optimizer), (theirs, their_optimizer) = exact.twin(student), exact.twin(teacher)
    rate = our_optimizer.param_groups[0]["lr"] if pilot_learning_rate is None else pilot_learning_rate
    parameters = dict(ours.named_parameters())
    lesson, before = answers(theirs)
    weights = parameters
    for _ in range(inner_steps):
        taught = imitation(models.apply(ours, weights, BATCH, hidden_states=True), lesson, BATCH["labels"]).mean()
        gradients = torch.autograd.grad(taught, list(weights.values()), create_graph=True, materialize_grads=True)
        if pilot_rule == "adamw":
            weights = adamw(weights, gradients, parameters, our_optimizer, rate)
        else:
            weights = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    quiz = task_loss(ours, weights, QUIZ)
    for parameter, gradient in zip(
        theirs.parameters(), torch.autograd.grad(quiz, list(theirs.parameters()), materialize_grads=True), strict=True
    ):
        parameter.grad = gradient
    exact.descend(theirs, their_optimizer)
    example = answers(theirs)[1] if pilot_update else before
    own = answers(ours)
    loss = imitation(own[0], example, BATCH["labels"]).mean()
    loss.backward()
    exact.descend(ours, our_optimizer)
    with torch.no_grad():
        distance = [imitation.agreement(own[1], z).mean().item() for z in (before, answers(theirs)[1])]
        watched = [task_loss(ours, at, WATCHED).item() for at in (weights, {})]
    entropies = [torch.distributions.Categorical(logits=z.logits).entropy().mean().item() for z in (own[1], example)]
    return (
        ours,
        theirs,
        {
            "loss": loss.item(),
            "feedback_loss": quiz.item(),
            "student_entropy": entropies[0],
            "teacher_entropy": entropies[1],
            "watch_better": float(watched[1] < watched[0]),
            "teacher_closer": float(distance[1] < distance[0]),
        },
    )


def assert_as_written(imitation, settings, tolerance=1e-9, real_steps=0, **others):
    student, teacher = exact.learners()
    step = metadistil(student, teacher, imitation, watch=WATCHED, **settings, **others)
    for _ in range(real_steps):
        step(QUIZ, WATCHED)
    ours, theirs, numbers = written(student, teacher, imitation, **settings)
    start = copy.deepcopy(teacher.module)
    assert step(BATCH, QUIZ) == pytest.approx(numbers, rel=1e-6)  # entropies are taken in float32
    assert exact.error(models.trainable(teacher.module), models.trainable(start)) > 1e-4
    assert exact.error(models.trainable(teacher.module), models.trainable(theirs)) < tolerance
    assert exact.error(models.trainable(student.module), models.trainable(ours)) < tolerance


OBJECTIVES = pytest.mark.parametrize("imitation", [KL, PATIENT, LOGITS], ids=["kl", "patient", "logits"])


@OBJECTIVES
@pytest.mark.parametrize("pilot_update", [True, False])
def test_step_is_the_derivative_through_one_plain_pilot_step(imitation, pilot_update):
    """Catches a wrong sign, a feedback gradient from the wrong place, a student with the wrong teacher."""
    assert_as_written(imitation, {"pilot_update": pilot_update, "pilot_learning_rate": 0.5})


@OBJECTIVES
def test_step_carries_the_derivative_back_through_three_pilot_steps(imitation):
    assert_as_written(imitation, {"inner_steps": 3, "pilot_learning_rate": 0.3})


@OBJECTIVES
def test_step_uses_moments_and_slopes_of_adamw(imitation):
    assert_as_written(imitation, {"pilot_rule": "adamw"}, real_steps=2)


@pytest.mark.parametrize("settings", [{"inner_steps": 3}, {"pilot_rule": "adamw"}], ids=str)
def test_without_pilot_update_the_student_has_the_old_teacher_after_any_experiment(settings):
    assert_as_written(KL, {"pilot_update": False, **settings}, real_steps=2)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_frozen_weights_of_the_student_stay_and_the_rest_learns(rule):
    """The optimiser holds what is trained only; the experiment asks it for no more."""
    student, teacher = exact.learners()
    student.module.bert.embeddings.requires_grad_(False)
    student = learner("student", student.module, student.accelerator, 1e-2, 100, warmup_ratio=0.0)
    before = copy.deepcopy([dict(who.module.named_parameters()) for who in (student, teacher)])
    metadistil(student, teacher, KL, pilot_rule=rule)(BATCH, QUIZ)
    for who, known in zip((student, teacher), before, strict=True):
        changed = {name for name, value in who.module.named_parameters() if not torch.equal(value, known[name])}
        trained = models.trainable(who.module).keys()
        assert changed <= trained and "classifier.weight" in changed


def test_first_adamw_step_has_no_moments_yet():
    assert_as_written(KL, {"pilot_rule": "adamw"})


@pytest.mark.parametrize(("tangent", "tolerance"), [("double-backward", 1e-9), ("finite-difference", 1e-4)])
def test_other_tangents_give_the_same_step(tangent, tolerance):
    assert_as_written(PATIENT, {"pilot_learning_rate": 0.5}, tolerance, tangent=tangent)


def snapshot(student):
    return copy.deepcopy(
        [
            student.module.state_dict(),
            student.optimizer.state_dict(),
            student.schedule.state_dict(),
            [part.training for part in student.module.modules()],
            [parameter.grad for parameter in student.module.parameters()],
            torch.get_rng_state(),
        ]
    )


def assert_same(ours, theirs):
    """Equal bit for bit, through lists and dicts."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict | list):
        assert len(ours) == len(theirs)
        keys = ours if isinstance(ours, dict) else range(len(ours))
        for key in keys:
            assert_same(ours[key], theirs[key])
    else:
        assert ours == theirs


@pytest.mark.parametrize("settings", [{"inner_steps": 3}, {"pilot_rule": "adamw"}], ids=str)
def test_the_experiment_leaves_no_trace_in_student_optimiser_schedule_and_generator(settings, monkeypatch):
    student, teacher = exact.learners(dropout=0.5)
    step = metadistil(student, teacher, PATIENT, watch=WATCHED, **settings)
    step(QUIZ, WATCHED)
    before, minimise, calls = snapshot(student), teacher.minimise, []

    def looked_at(*arguments):
        calls.append(assert_same(snapshot(student), before))
        value = minimise(*arguments)
        calls.append(assert_same(snapshot(student), before))
        return value

    monkeypatch.setattr(teacher, "minimise", looked_at)
    step(BATCH, QUIZ)
    assert len(calls) == 2


def test_the_teacher_learns_without_dropout_and_the_modes_come_back():
    ends = []
    for dropout in (0.0, 0.5):
        student, teacher = exact.learners(dropout)
        student.module.train(), teacher.module.train()
        teacher.module.bert.pooler.eval()
        modes = [[part.training for part in who.module.modules()] for who in (student, teacher)]
        metadistil(student, teacher, KL)(BATCH, QUIZ)
        assert modes == [[part.training for part in who.module.modules()] for who in (student, teacher)]
        ends.append(models.trainable(teacher.module))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_watching_changes_no_weight():
    ends = []
    for watch in (None, WATCHED):
        student, teacher = exact.learners(dropout=0.5)
        step = metadistil(student, teacher, PATIENT, watch=watch)
        torch.manual_seed(0)
        for data in ((BATCH, QUIZ), (QUIZ, BATCH)):
            numbers = step(*data)
        assert ("watch_better" in numbers) == ("teacher_closer" in numbers) == (watch is not None)
        ends.append([models.trainable(student.module), models.trainable(teacher.module)])
    assert_same(*ends)


def test_a_student_that_does_not_move_teaches_its_teacher_nothing():
    student, teacher = exact.learners(weight_decay=0.0)
    for group in student.optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy([models.trainable(who.module) for who in (student, teacher)])
    metadistil(student, teacher, KL)(BATCH, QUIZ)
    assert_same([models.trainable(who.module) for who in (student, teacher)], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, "sgd", 1), "inner_steps is 0"),
        ((1, "adam", 1), "pilot_rule is 'adam'; expected one of sgd, adamw"),
        ((2, "adamw", 1), "only one step of AdamW"),
        ((1, "sgd", 2), "micro_batches is 2"),
    ],
)
def test_settings_without_a_derivative_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(*settings)


@pytest.mark.parametrize("who", [0, 1])
def test_pieces_of_a_batch_are_refused_for_either_network(who):
    learners = exact.learners()
    learners[who].micro_batches = 2
    with pytest.raises(ValueError, match="micro_batches is 2"):
        metadistil(*learners, KL)


def teachers_gradient(precision, monkeypatch, **options):
    """What the teacher's second step would minimise, differentiated; in float32 networks."""
    student, teacher = exact.learners(accelerator=accelerator_for("cpu"))
    student.module.float(), teacher.module.float()
    metadistil(student, teacher, KL)(exact.batch(6, 3), WATCHED)
    student.accelerator = teacher.accelerator = accelerator_for("cpu", precision)
    found = []

    def caught(loss, batch):
        with teacher.accelerator.autocast():
            value = loss(batch).mean()
        found.extend(torch.autograd.grad(value, list(teacher.module.parameters()), materialize_grads=True))
        return value.item()

    monkeypatch.setattr(teacher, "minimise", caught)
    metadistil(student, teacher, KL, **options)(BATCH, QUIZ)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    return found


@pytest.mark.parametrize("tangent_precision", ["fp32", "autocast"])
@pytest.mark.parametrize("pilot_rule", ["sgd", "adamw"])
def test_in_bfloat16_the_teachers_gradient_keeps_its_direction(pilot_rule, tangent_precision, monkeypatch):
    """Not so for AdamW's very first step, whose derivative, ε / (|g| + ε)², lives where the gradient is noise."""
    expected = teachers_gradient("fp32", monkeypatch, pilot_rule=pilot_rule)
    found = teachers_gradient("bf16", monkeypatch, pilot_rule=pilot_rule, tangent_precision=tangent_precision)
    assert 1e-4 < exact.error(found, expected) < 0.15
