"""One step of MetaDistil against differentiating through Algorithm 1 as it is written; what a step must not touch."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.step import Saved
from kdlib import models, pilot
from kdlib.learner import accelerator_for, learner
from kdlib.methods import metadistil as module
from kdlib.methods.base import PilotRule
from kdlib.methods.metadistil import MetaDistil, metadistil
from kdlib.settings import checked
from tests import exact, pairs

BATCH, FEEDBACK = exact.batch(6, 0), exact.batch(6, 1)
MIXTURE = MetaDistil(alpha=0.3)
IMITATIONS = {
    "kl with labels": MIXTURE,
    "probability mse with pkd": MetaDistil(alpha=0.0, temperature=3.0, objective="probability_mse", pkd_weight=1.0),
    "logit mse": MetaDistil(alpha=0.5, temperature=1.0, objective="logit_mse"),
}
HALF = torch.bfloat16
FAR = 0.5  # of the pilot's plain steps: large enough that the place where the quiz is taken matters


def algorithm_1(
    student: pairs.Plain, teacher: pairs.Plain, imitation, steps=1, rule="sgd", rate=FAR, pilot_update=True
):
    """The paper's lines 3 to 7, differentiated through by autograd."""
    lesson, copy = teacher.answers(BATCH), dict(student.parameters)
    before = pilot.adamw_state(student.optimizer, student.parameters, rate)
    for _ in range(steps):
        loss = imitation.loss(student.answers(BATCH, copy), lesson, BATCH["labels"]).mean()
        values = torch.autograd.grad(loss, list(copy.values()), create_graph=True, materialize_grads=True)
        gradient = dict(zip(copy, values, strict=True))
        if rule == "sgd":
            copy = {name: value - rate * gradient[name] for name, value in copy.items()}
        else:
            copy = pilot.adamw(copy, gradient, before)
    teacher.descend(torch.nn.functional.cross_entropy(student.answers(FEEDBACK, copy).logits, FEEDBACK["labels"]))
    example = teacher.answers(BATCH) if pilot_update else lesson
    student.descend(imitation.loss(student.answers(BATCH), pairs.constants(example), BATCH["labels"]).mean())


def both(imitation=MIXTURE, warm=0, longest=1.0, **settings):
    """A step of ours and of the algorithm, from the same start; the learners and their plain counterparts."""
    student, teacher = pairs.pair(max_grad_norm=longest)
    for number in range(warm):  # so that AdamW's moments are not zero
        for who in (student, teacher):
            loss = lambda batch, who=who: pilot.task_loss(models.outputs(who.module, batch), batch)  # noqa: E731
            who.minimise(loss, exact.batch(6, 10 + number))
    for who in (student, teacher):  # the schedule moves the rate between steps; the plain ones have none
        for group in who.optimizer.param_groups:
            group["lr"] = pairs.RATE
    plain = pairs.Plain(student), pairs.Plain(teacher)
    rate = 3 * pairs.RATE if settings.get("pilot_rule") == "adamw" else FAR  # not that of the real student
    values = metadistil(student, teacher, replace(imitation, pilot_learning_rate=rate, **settings))(BATCH, FEEDBACK)
    names = {"inner_steps": "steps", "pilot_rule": "rule", "pilot_update": "pilot_update"}
    algorithm_1(*plain, imitation, rate=rate, **{names[k]: v for k, v in settings.items() if k in names})
    return values, (student, teacher), plain


def agree(result, tolerance=1e-9) -> bool:
    _, ours, plain = result
    return all(pairs.difference(*two) < tolerance for two in zip(ours, plain, strict=True))


@pytest.mark.parametrize("imitation", IMITATIONS.values(), ids=IMITATIONS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"pilot_update": False}, {"inner_steps": 3}, {"tangent": "double-backward"}, {"pilot_pieces": 4}],
    ids=["one step", "no pilot update", "three steps", "double backward", "unequal pieces"],
)
def test_a_step_is_that_of_algorithm_1(imitation, settings):
    assert agree(both(imitation, **settings))


@pytest.mark.parametrize("settings", [{}, {"inner_steps": 3}], ids=["one step", "three steps"])
def test_the_teachers_gradient_has_the_right_size_too(settings):
    """AdamW's first step is blind to it, and so is one that clips; a later one that does not is not."""
    assert agree(both(warm=2, longest=1e9, **settings))


@pytest.mark.parametrize("imitation", IMITATIONS.values(), ids=IMITATIONS)
@pytest.mark.parametrize("warm", [0, 2])
def test_an_adamw_experiment_is_differentiated_with_its_jacobian(imitation, warm):
    assert agree(both(imitation, warm, pilot_rule="adamw"))


def test_with_a_finite_difference_nearly_so():
    result = both(tangent="finite-difference")
    assert agree(result, 1e-3) and not agree(result, 1e-12)


def test_the_real_student_learns_from_the_new_teacher_unless_told_otherwise():
    """Were the order of the updates wrong, these two would be one."""
    ends = [both(pilot_update=update)[1][0] for update in (True, False)]
    assert exact.error(*(models.trainable(who.module) for who in ends)) > 1e-6


@pytest.mark.parametrize("settings", [{}, {"inner_steps": 2}, {"pilot_rule": "adamw"}], ids=str)
def test_the_experiment_is_discarded_and_leaves_optimiser_schedule_and_random_state_alone(settings):
    student, teacher = pairs.pair(dropout=0.5)
    step = metadistil(student, teacher, replace(MIXTURE, **settings))
    step(BATCH, FEEDBACK)  # the optimiser has moments now
    torch.manual_seed(3)
    before, random, seen = pairs.state(student), torch.get_rng_state(), []
    original = teacher.minimise

    def look(loss, batch):
        seen.append((pairs.same(pairs.state(student), before), torch.equal(torch.get_rng_state(), random)))
        return original(loss, batch)

    teacher.minimise = look
    step(BATCH, FEEDBACK)
    assert seen == [(True, True)]
    assert not pairs.same(pairs.state(student), before)


def test_dropout_is_no_part_of_the_teachers_update_and_modes_are_restored():
    ends = []
    for dropout in (0.0, 0.5):
        student, teacher = pairs.pair(dropout=dropout)
        metadistil(student, teacher, MIXTURE)(BATCH, FEEDBACK)
        assert all(part.training for who in (student, teacher) for part in who.module.modules())
        ends.append(pairs.weights(teacher))
    assert pairs.same(*ends)


def test_the_quiz_is_taken_after_the_experiment():
    """The logged loss is that of the copy, not of the student."""
    student, teacher = pairs.pair()
    plain, other = pairs.Plain(student), pairs.Plain(teacher)
    taught = lambda outputs, batch: MIXTURE.loss(outputs, other.answers(BATCH), batch["labels"])  # noqa: E731
    copy = pilot.sgd_step(plain.module, models.trainable(plain.module), BATCH, taught, FAR)
    expected = pilot.task_loss(models.apply(plain.module, copy, FEEDBACK), FEEDBACK).mean()
    values = metadistil(student, teacher, replace(MIXTURE, pilot_learning_rate=FAR))(BATCH, FEEDBACK)
    assert values["feedback_loss"] == pytest.approx(expected.item(), rel=1e-10)


def test_the_teachers_step_lowers_the_quiz_loss_of_the_next_experiment():
    """The sign: the same lesson again, from the new teacher, ends better."""
    student, teacher = pairs.pair(rate=1e-4)
    start = pairs.weights(student)
    step, values = metadistil(student, teacher, replace(MIXTURE, pilot_learning_rate=FAR)), []
    for _ in range(4):
        student.module.load_state_dict(start)
        values.append(step(BATCH, FEEDBACK)["feedback_loss"])
    assert values == sorted(values, reverse=True)


def test_a_student_that_stands_still_teaches_the_teacher_nothing():
    student, teacher = pairs.pair(weight_decay=0.0)
    for group in student.optimizer.param_groups:
        group["lr"] = 0.0
    before = pairs.weights(teacher)
    metadistil(student, teacher, MIXTURE)(BATCH, FEEDBACK)
    assert pairs.same(pairs.weights(teacher), before)


def test_the_pilot_takes_the_students_present_rate():
    ends = []
    for rate in (None, pairs.RATE):
        student, teacher = pairs.pair()
        teacher.optimizer.param_groups[0]["lr"] *= 3  # it has a rate of its own
        metadistil(student, teacher, replace(MIXTURE, pilot_learning_rate=rate))(BATCH, FEEDBACK)
        ends.append(pairs.weights(teacher))
    assert pairs.same(*ends)


def test_what_is_logged_is_the_real_students_loss_and_both_entropies_at_the_lesson_that_it_had():
    """With dropout in the student's own pass and none in the teacher's answers, those of after its step."""
    for update in (True, False):
        student, teacher = pairs.pair(dropout=0.5)
        before = models.targets(teacher.module, BATCH)
        twin = pairs.pair(dropout=0.5)[0]
        torch.manual_seed(0)
        values = metadistil(student, teacher, replace(MIXTURE, pilot_update=update))(BATCH, FEEDBACK)
        example = models.targets(teacher.module, BATCH) if update else before
        torch.manual_seed(0)  # nothing but the student's own pass has drawn anything
        own = models.outputs(twin.module, BATCH)
        loss = MIXTURE.loss(own, example, BATCH["labels"]).mean().item()
        entropies = [torch.distributions.Categorical(logits=z.logits).entropy().mean().item() for z in (own, example)]
        logged = [values["loss"], values["student_entropy"], values["teacher_entropy"]]
        assert logged == pytest.approx([loss, *entropies], rel=1e-6)
        assert (exact.error(example.logits, before.logits) > 1e-6) == update


def test_watching_changes_nothing_and_measures():
    ends = []
    for watch in (None, exact.batch(8, 5)):
        torch.manual_seed(0)
        student, teacher = pairs.pair(dropout=0.3)
        step = metadistil(student, teacher, MIXTURE, watch)
        values = [step(BATCH, FEEDBACK) for _ in range(2)]
        ends.append((pairs.weights(student), pairs.weights(teacher)))
    assert pairs.same(*ends)
    for measured in values:
        assert measured["teacher_closer"] in (0.0, 1.0)
        assert measured["watch_better"] + measured["watch_equal"] + measured["watch_worse"] == 1


@given(st.floats(0, 10), st.floats(0, 10), st.booleans())
def test_a_comparison_is_a_win_a_tie_or_a_loss(ours, theirs, tie):
    theirs = ours if tie else theirs
    names = ("watch_worse", "watch_equal", "watch_better")
    values = module.won_tied_lost(ours, theirs)
    assert values == dict.fromkeys(names, 0.0) | {names[int(np.sign(theirs - ours)) + 1]: 1.0} | {
        "watch_gain": theirs - ours
    }


def fair_comparison(sign: int, rate: float, max_grad_norm: float = math.inf) -> dict[str, float]:
    """What a step that is watched on its own quiz says: copy and student by AdamW, the teacher's step times a sign."""
    student, teacher = pairs.pair(rate=1e-3, max_grad_norm=max_grad_norm)[0], pairs.pair(rate=rate)[1]
    minimise = teacher.minimise
    teacher.minimise = lambda loss, batch: minimise(lambda piece: sign * loss(piece), batch)
    step = metadistil(student, teacher, replace(MIXTURE, pilot_rule="adamw"), FEEDBACK)
    return [step(BATCH, FEEDBACK) for _ in range(3)][-1]  # AdamW's first step is a sign, whoever teaches


def test_a_teacher_is_closer_if_its_step_led_it_towards_the_student_that_it_taught():
    """One step and the same step turned round: one of them leads away."""
    found = []
    for sign in (1, -1):
        student, teacher = pairs.pair()
        teacher.optimizer.param_groups[0]["lr"] = teacher.optimizer.param_groups[1]["lr"] = sign * 1e-3
        taught, lesson = (models.targets(who.module, BATCH) for who in (student, teacher))
        values = metadistil(student, teacher, replace(MIXTURE, pilot_learning_rate=FAR), FEEDBACK)(BATCH, FEEDBACK)
        after = models.targets(teacher.module, BATCH)
        distances = [MIXTURE.agreement(taught, answers).mean().item() for answers in (lesson, after)]
        assert values["teacher_closer"] == (distances[1] < distances[0])
        found.append(values["teacher_closer"])
    assert sorted(found) == [0.0, 1.0]


def test_a_fair_comparison_is_won_by_the_teachers_step_and_lost_when_it_is_turned_round():
    better, worse = (fair_comparison(sign, rate=1e-5) for sign in (1, -1))
    assert better["watch_better"] == worse["watch_worse"] == 1
    assert better["watch_gain"] == pytest.approx(-worse["watch_gain"], rel=0.05)


def test_a_fair_comparison_with_a_teacher_that_stands_still_has_nothing_to_tell():
    """Copy and student take the same step: that is what makes it fair, and what clipping the student's alone breaks."""
    moved = abs(fair_comparison(1, rate=1e-5)["watch_gain"])
    assert abs(fair_comparison(1, rate=0.0)["watch_gain"]) < 1e-6 * moved
    assert abs(fair_comparison(1, rate=0.0, max_grad_norm=0.1)["watch_gain"]) > moved


@pytest.mark.parametrize(("options", "inside"), [({}, torch.float32), ({"tangent_precision": "autocast"}, HALF)])
def test_experiment_quiz_and_tangent_run_in_the_precision_they_are_given_and_everything_else_as_in_training(
    options, inside
):
    """The teacher's gradient changes a little by it; a switch that is turned the wrong way changes it a little, too."""
    gradients = []
    for precision in ("fp32", "bf16"):
        student, teacher = pairs.pair()
        for who in (student, teacher):
            who.module.float()
            who.accelerator = accelerator_for("cpu", precision)

        def keep(loss, batch, teacher=teacher):
            loss(batch).mean().backward()
            gradients.append(
                {name: p.grad.clone() for name, p in teacher.module.named_parameters() if p.grad is not None}
            )

        teacher.minimise = keep
        passes = pairs.precisions(student, teacher)
        metadistil(student, teacher, replace(MIXTURE, **options))(BATCH, FEEDBACK)
    trial = [("student", inside)] * 3  # the experiment, the quiz, the tangent
    assert passes == [("teacher", HALF), *trial, ("teacher", HALF), ("student", HALF)]
    assert 0 < exact.error(gradients[1], gradients[0]) < 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"inner_steps": 2, "pilot_rule": "adamw"}, "only one step of AdamW"),
        ({"pilot_rule": "adam"}, "pilot_rule is 'adam'; expected one of sgd, adamw"),
        ({"pilot_learning_rate": 0.0}, "pilot_learning_rate is 0.0; expected a positive number"),
        ({"tangent": "vjp"}, "tangent is 'vjp'; expected one of jvp"),
        ({"tangent_precision": "fp16"}, "tangent_precision is 'fp16'; expected one of fp32, autocast"),
        ({"pilot_pieces": 0}, "pilot_pieces is 0"),
        ({"pilot_pieces": 2, "objective": "dist"}, "pilot_pieces is 2: objective 'dist'"),
    ],
)
def test_settings_without_meaning_are_refused(wrong, message):
    with pytest.raises(ValidationError):
        MetaDistil(**wrong)
    assert message in checked(MetaDistil, wrong)[1][0]


@pytest.mark.parametrize("who", [0, 1])
def test_micro_batches_of_either_network_are_refused(who):
    both = pairs.pair()
    both[who].micro_batches = 2
    with pytest.raises(ValueError, match="micro_batches is 2"):
        metadistil(*both, MIXTURE)


@pytest.mark.parametrize("rule", get_args(PilotRule))
def test_pieces_change_nothing_but_what_is_kept_for_the_backward_passes(rule):
    ends, kept, sizes = [], [], []
    for pieces in (1, 4):
        student, teacher = pairs.pair()
        student.module.register_forward_hook(lambda *what: sizes.append(len(what[-1].logits)))
        step = metadistil(student, teacher, replace(MIXTURE, pilot_rule=rule, pilot_pieces=pieces))
        saved = Saved([student.module, teacher.module])
        with saved:
            logged = step(BATCH, FEEDBACK)
        ends.append((pairs.weights(student), pairs.weights(teacher), torch.tensor(list(logged.values()))))
        kept.append(saved.most)
    assert exact.error(*ends) < 1e-9
    assert kept[1] < 0.95 * kept[0]
    assert sizes == [6, 6, 6, 6] + [2, 2, 1, 1] * 2 + [6, 6]  # experiment, quiz, tangent, the student's own step


def test_a_batch_that_is_not_cut_may_have_samples_that_are_compared():
    metadistil(*pairs.pair(), MetaDistil(objective="dist"))


@pytest.mark.parametrize("rule", get_args(PilotRule))
def test_frozen_weights_stay_out_of_the_experiment(rule):
    student, teacher = pairs.pair()
    embeddings = student.module.bert.embeddings.requires_grad_(False)
    student = learner("student", student.module, student.accelerator, pairs.RATE, 100, warmup_ratio=0.0)
    before = pairs.weights(teacher), {n: p.clone() for n, p in embeddings.named_parameters()}
    metadistil(student, teacher, replace(MIXTURE, pilot_rule=rule))(BATCH, FEEDBACK)
    assert pairs.same(dict(embeddings.named_parameters()), before[1])
    assert not pairs.same(pairs.weights(teacher), before[0])
