"""A step of IKD against plain autograd through course and exam as the paper writes them; the feedback matrix."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from kdlib import models, pilot
from kdlib.learner import accelerator_for, learner
from kdlib.methods import ikd as module
from kdlib.methods import kd, metadistil
from kdlib.methods.ikd import IKD, feedback, ikd
from kdlib.settings import checked
from kdlib.tangent import feedback_gradient, student_tangent
from tests import exact, pairs

COURSE, EXAM = exact.batch(6, 0), exact.batch(5, 1)
MIXTURE = IKD(alpha=0.3)
IMITATIONS = {
    "kl with labels": MIXTURE,
    "probability mse with pkd": IKD(alpha=0.0, temperature=3.0, objective="probability_mse", pkd_weight=1.0),
    "logit mse": IKD(alpha=0.5, temperature=1.0, objective="logit_mse"),
}
FEEDBACK_AT = ("before", "after")
HALF = torch.bfloat16
FAR = 0.5  # of the course's plain step: large enough that the place where the exam is taken matters
GARBAGE = {**COURSE, "labels": torch.full_like(COURSE["labels"], -7)}


def exam_loss(who: pairs.Plain, batch, parameters=None):
    return F.cross_entropy(who.answers(batch, parameters).logits, batch["labels"])


def written(student: pairs.Plain, teacher: pairs.Plain, imitation, exam, gamma, at, rate, labelled=True):
    """Eqs. (5) to (11): L_tea by autograd through the course step, L_stu on the old teacher's answers, then both steps.

    Before the step, eq. (14) is ⟨g, φ_{t+1}⟩ with g held fixed, whose derivative in the teacher is g · ∇_θ φ_{t+1}.
    """
    lesson, here = teacher.answers(COURSE), student.parameters
    course = imitation.loss(student.answers(COURSE), lesson, COURSE["labels"]).mean()
    gradient = torch.autograd.grad(course, list(here.values()), create_graph=True, materialize_grads=True)
    moved = {name: here[name] - rate * value for name, value in zip(here, gradient, strict=True)}
    if at == "after":
        meta = exam_loss(student, exam, moved)
    else:
        g = torch.autograd.grad(exam_loss(student, exam), list(here.values()), materialize_grads=True)
        meta = sum((value * moved[name]).sum() for name, value in zip(here, g, strict=True))
    own = F.cross_entropy(lesson.logits, COURSE["labels"]) if labelled else exam_loss(teacher, exam)
    teacher.descend(gamma * meta + (1 - gamma) * own)
    student.descend(imitation.loss(student.answers(COURSE), pairs.constants(lesson), COURSE["labels"]).mean())


def stepped(imitation=MIXTURE, course=COURSE, exam=EXAM, dropout=0.0, rate=FAR, **options):
    """The learners after one of our steps."""
    student, teacher = pairs.pair(dropout)
    step = ikd(student, teacher, replace(imitation, pilot_learning_rate=rate, **options))
    step(*[course] if exam is None else [course, exam])
    return student, teacher


def teachers_gradient(monkeypatch, student, teacher, **options) -> dict[str, torch.Tensor]:
    """What one of our steps would hand to the teacher's optimiser, before clipping; nobody moves."""

    def keep(_, losses, batch):
        losses(batch)[1].mean().backward()
        return [0.0, 0.0]

    with monkeypatch.context() as patch:
        patch.setattr(module, "minimise_together", keep)
        ikd(student, teacher, replace(MIXTURE, meta_weight=1.0, **options))(COURSE, EXAM)
    return {name: p.grad.clone() for name, p in teacher.module.named_parameters() if p.grad is not None}


def start() -> tuple[pairs.Plain, pairs.Plain]:
    return tuple(pairs.Plain(who) for who in pairs.pair())


def agree(ours, plain, tolerance=1e-9) -> bool:
    return all(pairs.difference(*two) < tolerance for two in zip(ours, plain, strict=True))


def ends(ours) -> list:
    return [pairs.weights(who) for who in ours]


EXAMS = {"course is exam": None, "another exam": EXAM}
# The first imitation in all ways; of the others, only their losses are new: two ways each.
STEPS = [(next(iter(IMITATIONS)), *rest) for rest in itertools.product((1.0, 0.3), FEEDBACK_AT, EXAMS)]
STEPS += [
    (name, *rest)
    for name in [*IMITATIONS][1:]
    for rest in ((0.3, "after", "another exam"), (1.0, "before", "course is exam"))
]


@pytest.mark.parametrize(("name", "gamma", "at", "exam"), STEPS)
def test_a_step_is_that_of_course_and_exam(name, gamma, at, exam):
    plain, imitation, exam = start(), IMITATIONS[name], EXAMS[exam]
    written(*plain, imitation, COURSE if exam is None else exam, gamma, at, FAR)
    assert agree(stepped(imitation, exam=exam, meta_weight=gamma, feedback_at=at), plain)


@pytest.mark.parametrize("at", FEEDBACK_AT)
def test_other_derivatives_of_the_student(at):
    plain = start()
    written(*plain, MIXTURE, EXAM, 1.0, at, FAR)
    options = {"meta_weight": 1.0, "feedback_at": at}
    assert agree(stepped(tangent="double-backward", **options), plain)
    near = stepped(tangent="finite-difference", **options)
    assert agree(near, plain, 1e-3) and not agree(near, plain, 1e-12)


def test_exact_and_without_labels_for_the_teacher_it_is_metadistil_without_its_pilot_update():
    student, teacher = pairs.pair()
    metadistil.metadistil(
        student, teacher, metadistil.MetaDistil(alpha=0.3, pilot_update=False, pilot_learning_rate=FAR)
    )(COURSE, EXAM)
    ours = stepped(meta_weight=1.0, feedback_at="after")
    for one, other in zip(ours, (student, teacher), strict=True):
        assert exact.error(models.trainable(one.module), models.trainable(other.module)) < 1e-12


def test_the_student_learns_from_the_teacher_as_it_was():
    """The order of the updates: both from the state before, so the student's step is that of vanilla distillation."""
    student, teacher = pairs.pair()
    kd.distillation(student, lambda batch: models.targets(teacher.module, batch), MIXTURE)(COURSE)
    assert exact.error(pairs.weights(stepped()[0]), pairs.weights(student)) < 1e-14


def test_the_shortcut_is_taken_before_the_step_and_meets_the_exact_gradient_at_small_rates(monkeypatch):
    gaps = []
    for rate in (FAR, FAR / 100, FAR / 1000):
        options = [{"feedback_at": at, "pilot_learning_rate": rate} for at in FEEDBACK_AT]
        gaps.append(exact.error(*(teachers_gradient(monkeypatch, *pairs.pair(), **each) for each in options)))
    assert gaps[0] > 0.05 and gaps[2] == pytest.approx(gaps[1] / 10, rel=0.1)


@pytest.mark.parametrize("at", FEEDBACK_AT)
def test_the_exams_loss_is_logged_where_its_gradient_is_taken(at):
    plain, other = start()
    place = models.trainable(plain.module)
    if at == "after":
        taught = lambda outputs, batch: MIXTURE.loss(outputs, other.answers(COURSE), batch["labels"])  # noqa: E731
        place = pilot.sgd_step(plain.module, place, COURSE, taught, FAR)
    values = ikd(*pairs.pair(), replace(MIXTURE, feedback_at=at, pilot_learning_rate=FAR))(COURSE, EXAM)
    assert values["feedback_loss"] == pytest.approx(exam_loss(plain, EXAM, place).item(), rel=1e-10)


def test_the_teachers_step_lowers_the_exams_loss_of_the_next_course():
    """The sign: the same course again, from the new teacher, ends better."""
    student, teacher = pairs.pair(rate=1e-4)
    begin = pairs.weights(student)
    step, values = (
        ikd(student, teacher, replace(MIXTURE, meta_weight=1.0, feedback_at="after", pilot_learning_rate=FAR)),
        [],
    )
    for _ in range(4):
        student.module.load_state_dict(begin)
        values.append(step(COURSE, EXAM)["feedback_loss"])
    assert values == sorted(values, reverse=True)


class TestCourseWithoutLabels:
    IMITATION = IKD(alpha=0.0)

    @pytest.mark.parametrize("at", FEEDBACK_AT)
    @pytest.mark.parametrize("gamma", [1.0, 0.3])
    def test_a_step_is_the_written_one_with_the_teachers_labels_from_the_exam(self, at, gamma):
        plain = start()
        written(*plain, self.IMITATION, EXAM, gamma, at, FAR, labelled=False)
        ours = stepped(self.IMITATION, meta_weight=gamma, feedback_at=at, labelled_course=False)
        assert agree(ours, plain)

    @pytest.mark.parametrize("at", FEEDBACK_AT)
    def test_the_labels_of_the_course_are_read_by_nobody(self, at):
        options = {"feedback_at": at, "labelled_course": False}
        with_labels, with_garbage = (stepped(self.IMITATION, batch, **options) for batch in (COURSE, GARBAGE))
        assert pairs.same(ends(with_labels), ends(with_garbage))

    def test_with_labels_they_are_read(self):
        """Else the test above would hold of anything."""
        with pytest.raises(ValueError, match="label -7 is outside"):
            stepped(self.IMITATION, GARBAGE)

    def test_it_cannot_be_its_own_exam(self):
        with pytest.raises(ValueError, match="the course has no labels, so it cannot be the exam"):
            stepped(self.IMITATION, exam=None, labelled_course=False)


def test_without_weight_on_the_exam_the_teacher_learns_from_labels_alone():
    plain = start()[1]
    plain.descend(F.cross_entropy(plain.answers(COURSE).logits, COURSE["labels"]))
    assert pairs.difference(stepped(meta_weight=0.0)[1], plain) < 1e-9


def test_with_all_weight_on_the_exam_the_teacher_reads_no_label_of_the_course():
    ours = [stepped(IKD(alpha=0.0), batch, meta_weight=1.0)[1] for batch in (COURSE, GARBAGE)]
    assert pairs.same(*map(pairs.weights, ours))


@pytest.mark.parametrize("at", FEEDBACK_AT)
def test_nothing_of_the_exam_reaches_the_student(at):
    """Its step depends on the course only: the feedback is a constant for it."""
    one, other = (stepped(exam=exact.batch(5, seed), feedback_at=at) for seed in (1, 2))
    assert pairs.same(pairs.weights(one[0]), pairs.weights(other[0]))
    assert not pairs.same(pairs.weights(one[1]), pairs.weights(other[1]))


@pytest.mark.parametrize("at", FEEDBACK_AT)
def test_before_both_move_optimiser_schedule_and_random_state_are_left_alone(at, monkeypatch):
    student, teacher = pairs.pair(dropout=0.5)
    step = ikd(student, teacher, replace(MIXTURE, feedback_at=at))
    step(COURSE, EXAM)  # the optimisers have moments now
    before, random, seen = pairs.state(student), torch.get_rng_state(), []
    original = module.minimise_together

    def look(learners, loss, batch):
        seen.append((pairs.same(pairs.state(student), before), torch.equal(torch.get_rng_state(), random)))
        return original(learners, loss, batch)

    monkeypatch.setattr(module, "minimise_together", look)
    step(COURSE, EXAM)
    assert seen == [(True, True)]
    assert not pairs.same(pairs.state(student), before)


@pytest.mark.parametrize("labelled", [True, False])
def test_dropout_is_no_part_of_the_teachers_update_and_modes_are_restored(labelled):
    found = []
    for dropout in (0.0, 0.5):
        both = stepped(IKD(alpha=0.0), dropout=dropout, labelled_course=labelled)
        assert all(part.training for who in both for part in who.module.modules())
        found.append(pairs.weights(both[1]))
    assert pairs.same(*found)


def test_the_rate_is_the_students_present_one(monkeypatch):
    gradients = []
    for rate in (pairs.RATE, None):
        student, teacher = pairs.pair()
        teacher.optimizer.param_groups[0]["lr"] *= 3  # it has a rate of its own
        options = {"feedback_at": "after", "pilot_learning_rate": rate}
        gradients.append(teachers_gradient(monkeypatch, student, teacher, **options))
    assert pairs.same(*gradients)


@pytest.mark.parametrize("at", FEEDBACK_AT)
def test_what_is_logged_is_the_students_loss_and_both_entropies_before_the_step(at):
    student, teacher = pairs.pair(dropout=0.5)
    example, twin = models.targets(teacher.module, COURSE), pairs.pair(dropout=0.5)[0]
    torch.manual_seed(0)
    values = ikd(student, teacher, replace(MIXTURE, feedback_at=at))(COURSE, EXAM)
    torch.manual_seed(0)  # nothing but the student's own pass has drawn anything
    own = models.outputs(twin.module, COURSE)
    loss = MIXTURE.loss(own, example, COURSE["labels"]).mean().item()
    entropies = [torch.distributions.Categorical(logits=z.logits).entropy().mean().item() for z in (own, example)]
    logged = [values["loss"], values["student_entropy"], values["teacher_entropy"]]
    assert logged == pytest.approx([loss, *entropies], rel=1e-6)


@pytest.mark.parametrize(
    ("tangent", "at", "passes"),
    [("jvp", "before", 3), ("jvp", "after", 4), ("finite-difference", "after", 5), ("forward-difference", "after", 4)],
)
def test_a_difference_reuses_the_copys_own_pass(tangent, at, passes):
    """The copy's course, the exam, the tangent, the student's own step."""
    student, teacher = pairs.pair()
    calls = []
    student.module.register_forward_hook(lambda *_: calls.append(1))
    ikd(student, teacher, replace(MIXTURE, tangent=tangent, feedback_at=at))(COURSE, EXAM)
    assert len(calls) == passes


def test_a_student_that_stands_still_teaches_the_teacher_nothing():
    student, teacher = pairs.pair(weight_decay=0.0)
    for group in student.optimizer.param_groups:
        group["lr"] = 0.0
    before = pairs.weights(teacher)
    ikd(student, teacher, replace(MIXTURE, meta_weight=1.0))(COURSE, EXAM)
    assert pairs.same(pairs.weights(teacher), before)


@pytest.mark.parametrize("at", FEEDBACK_AT)
def test_frozen_weights_stay_where_they_are(at):
    student, teacher = pairs.pair()
    embeddings = student.module.bert.embeddings.requires_grad_(False)
    student = learner("student", student.module, student.accelerator, pairs.RATE, 100, warmup_ratio=0.0)
    before = pairs.weights(teacher), {n: p.clone() for n, p in embeddings.named_parameters()}
    ikd(student, teacher, replace(MIXTURE, feedback_at=at))(COURSE, EXAM)
    assert pairs.same(dict(embeddings.named_parameters()), before[1])
    assert not pairs.same(pairs.weights(teacher), before[0])


@pytest.mark.parametrize("at", FEEDBACK_AT)
@pytest.mark.parametrize(("options", "inside"), [({}, torch.float32), ({"tangent_precision": "autocast"}, HALF)])
def test_course_exam_and_tangent_run_in_the_precision_they_are_given_and_everything_else_as_in_training(
    options, inside, at, monkeypatch
):
    """The teacher's gradient changes a little by it; a switch that is turned the wrong way changes it a little, too."""
    gradients = []
    for precision in ("fp32", "bf16"):
        both = pairs.pair()
        for who in both:
            who.module.float()
            who.accelerator = accelerator_for("cpu", precision)
        passes = pairs.precisions(*both)
        gradients.append(teachers_gradient(monkeypatch, *both, feedback_at=at, **options))
    trial = [("student", inside)] * (3 if at == "after" else 2)  # the copy's course, the exam, the tangent
    # The last pass is the student's own, which `minimise_together` would put under autocast; here it is left out.
    assert passes == [("teacher", HALF), *trial, ("student", torch.float32)]
    assert 0 < exact.error(gradients[1], gradients[0]) < 0.2


class TestFeedback:
    @staticmethod
    def along(at, course=COURSE, exam=EXAM):
        """The student's logits and their tangent along the exam's gradient, and what they were computed from."""
        student, teacher = start()
        lesson = teacher.answers(course)
        taught = lambda outputs, batch: MIXTURE.loss(outputs, lesson, batch["labels"])  # noqa: E731
        here = models.trainable(student.module)
        place = pilot.sgd_step(student.module, here, course, taught, FAR) if at == "after" else here
        g = feedback_gradient(student.module, place, exam)
        outputs, tangents = student_tangent(student.module, here, course, g)
        return student, teacher, g, outputs.logits, tangents.logits

    def test_it_weighs_the_soft_targets_to_the_meta_gradient(self):
        """Eqs. (13) and (15) with all their constants: N, λ, T, and the student at T as well."""
        student, teacher, _, logits, tangent = self.along("after")
        fb = feedback(logits, tangent, FAR, weight=0.7, temperature=2.0)
        lesson = teacher.answers(COURSE).logits
        weighed = (fb * F.softmax(lesson / 2.0, dim=-1)).sum(-1).mean()
        parameters = list(teacher.parameters.values())
        ours = torch.autograd.grad(weighed, parameters, materialize_grads=True)

        here = student.parameters
        course = MIXTURE.loss(student.answers(COURSE), teacher.answers(COURSE), COURSE["labels"]).mean()
        gradient = torch.autograd.grad(course, list(here.values()), create_graph=True, materialize_grads=True)
        moved = {name: here[name] - FAR * value for name, value in zip(here, gradient, strict=True)}
        through = torch.autograd.grad(exam_loss(student, EXAM, moved), parameters, materialize_grads=True)
        assert exact.error(ours, through) < 1e-10

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_it_is_the_derivative_of_the_log_probabilities(self, temperature):
        student, _, g, logits, tangent = self.along("before")
        fb = feedback(logits, tangent, 0.1, temperature=temperature)
        step, ends = 1e-6, []
        for sign in (1, -1):
            there = {name: p.detach() + sign * step * g[name] for name, p in student.parameters.items()}
            ends.append(F.log_softmax(student.answers(COURSE, there).logits / temperature, dim=-1))
        assert exact.error(fb, 0.1 * temperature**2 * (ends[0] - ends[1]) / (2 * step)) < 1e-7

    def test_on_one_sample_that_is_its_own_exam_it_is_minus_a_square(self):
        """Eq. (16)."""
        one = exact.batch(1, 4)
        student, _, _, logits, tangent = self.along("before", one, one)
        label = one["labels"].item()
        log_p = F.log_softmax(student.answers(one).logits, dim=-1)[0, label]
        slope = torch.autograd.grad(log_p, list(student.parameters.values()), materialize_grads=True)
        square = sum(value.square().sum() for value in slope)
        torch.testing.assert_close(feedback(logits, tangent, 0.1)[0, label], -0.1 * square)

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), temperature=st.floats(0.2, 10))
    def test_its_mean_under_the_students_prediction_is_zero(self, seed, classes, temperature):
        generator = torch.Generator().manual_seed(seed)
        logits, tangent = 3 * torch.randn(2, 7, classes, generator=generator, dtype=torch.float64)
        fb = feedback(logits, tangent, 0.3, 0.4, temperature)
        p = F.softmax(logits / temperature, dim=-1)
        torch.testing.assert_close((p * fb).sum(-1), torch.zeros(7).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"meta_weight": 1.5}, "meta_weight is 1.5; expected a number between 0"),
        ({"feedback_at": "now"}, "feedback_at is 'now'; expected one of before, after"),
        ({"exam": "test"}, "exam is 'test'; expected one of course, train, feedback"),
    ],
)
def test_settings_without_meaning_are_refused(wrong, message):
    with pytest.raises(ValidationError):
        IKD(**wrong)
    assert message in checked(IKD, wrong)[1][0]


def test_the_exam_is_the_course_where_that_has_labels():
    assert (IKD().exam, IKD().feedback, IKD().carves) == ("course", None, False)
    assert (IKD(exam="train").feedback, IKD(exam="train").carves) == ("train", False)
    unlabelled = IKD(labelled_course=False)
    assert (unlabelled.exam, unlabelled.feedback, unlabelled.alpha, unlabelled.carves) == ("feedback",) * 2 + (
        0.0,
        True,
    )


@pytest.mark.parametrize("who", [0, 1])
def test_micro_batches_of_either_network_are_refused(who):
    both = pairs.pair()
    both[who].micro_batches = 2
    with pytest.raises(ValueError, match="micro_batches is 2"):
        ikd(*both, MIXTURE)
