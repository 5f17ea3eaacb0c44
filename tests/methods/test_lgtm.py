"""One step of LGTM against Algorithm 1 as written, by plain autograd; what a step must not touch; its relatives."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from kdlib import influence, losses, models, pilot
from kdlib.learner import accelerator_for, learner
from kdlib.methods.lgtm import LGTM, RELEASED, Variant, lgtm
from kdlib.methods.metadistil import MetaDistil, metadistil
from kdlib.methods.online import ProKT, online_distillation
from kdlib.settings import checked
from kdlib.tangent import feedback_gradient
from tests import exact, pairs

BATCH, FEEDBACK = exact.batch(6, 0), exact.batch(6, 1)
STUDENTS = {
    "kl with labels": {"alpha": 0.3},
    "soft cross entropy": {"alpha": 0.0, "temperature": 1.0, "objective": "soft_cross_entropy"},
    "probability mse with pkd": {
        "alpha": 0.2,
        "temperature": 3.0,
        "objective": "probability_mse",
        "pkd_weight": 1.0,
    },
    "logit mse": {"alpha": 0.5, "temperature": 1.0, "objective": "logit_mse"},
    "dist": {"alpha": 0.3, "temperature": 1.0, "objective": "dist"},
}
TEACHERS = {"teacher_alpha": 0.6, "teacher_objective": "kl"}
IMITATIONS = {
    name: LGTM(**imitated, **TEACHERS, influence_weight=1.0, pilot_rule="sgd") for name, imitated in STUDENTS.items()
}
MIXTURE = IMITATIONS["kl with labels"]
AUXILIARY = ProKT(**STUDENTS["kl with labels"], **TEACHERS)
VARIANTS = get_args(Variant)
HALF = torch.bfloat16
FAR = 0.5  # of the pilot's plain steps: large enough that the place where the feedback is taken matters


def inner(first, second) -> torch.Tensor:
    return sum((a * b).sum() for a, b in zip(first, second, strict=True))


class Lesson:
    """Lines 2 to 7 of Algorithm 1 for one batch, written out: double backward passes, sample by sample."""

    def __init__(self, student: pairs.Plain, teacher: pairs.Plain, imitation: LGTM, rule="sgd", rate=FAR):
        self.imitation, self.rate, self.labels = imitation, rate, BATCH["labels"]
        self.theirs, self.ours = teacher.answers(BATCH), student.answers(BATCH)
        self.weights = list(student.parameters.values())
        gradient = self.gradient(imitation.loss(self.ours, self.theirs, self.labels).mean())
        state = pilot.adamw_state(student.optimizer, student.parameters, rate)

        def moved(gradient):
            named = dict(zip(student.parameters, gradient, strict=True))
            if rule == "adamw":
                return pilot.adamw(student.parameters, named, state)
            return {name: value - rate * named[name] for name, value in student.parameters.items()}

        def feedback_loss(copy):
            return F.cross_entropy(student.answers(FEEDBACK, copy).logits, FEEDBACK["labels"])

        self.feedback_loss = feedback_loss(moved(gradient))
        copy = {name: value.detach().requires_grad_() for name, value in moved(gradient).items()}
        self.g = torch.autograd.grad(feedback_loss(copy), list(copy.values()), materialize_grads=True)
        leaves = [value.detach().requires_grad_() for value in gradient]
        slope = torch.autograd.grad(inner(moved(leaves).values(), self.g), leaves)
        self.g_of_the_rule = [torch.nan_to_num(-value / rate) for value in slope]

    def gradient(self, value):
        return torch.autograd.grad(value, self.weights, create_graph=True, materialize_grads=True)

    def distillation(self):
        """ℓ: the student's loss without its labels, over 1 − α."""
        alpha, hard = self.imitation.alpha, F.cross_entropy(self.ours.logits, self.labels, reduction="none")
        return (self.imitation.loss(self.ours, self.theirs, self.labels) - alpha * hard) / (1 - alpha)

    def auxiliary(self):
        return self.imitation.teachers_loss(self.theirs, pairs.constants(self.ours), self.labels).mean()

    def influences(self, values, g):
        return torch.stack([inner(self.gradient(value), g) for value in values])

    def term(self, variant: str, weight: float):
        if variant == "meta":  # as the derivative of the pilot's feedback loss, whatever influences may be
            return weight / ((1 - self.imitation.alpha) * self.rate) * self.feedback_loss
        if variant == "released":
            loss = self.imitation.teachers_loss(self.theirs, self.ours, self.labels)
            return -weight * self.influences(loss, self.g).mean()
        influences = self.influences(self.distillation(), self.g_of_the_rule)
        if variant == "printed":
            return weight * influences.mean()
        return weight * (influences.detach() * self.distillation()).mean()


def algorithm_1(student, teacher, imitation, variant, weight=1.0, share=None, rule="sgd", rate=FAR):
    """The paper's lines 2 to 9."""
    lesson = Lesson(student, teacher, imitation, rule, rate)
    auxiliary = lesson.auxiliary() if imitation.auxiliary else 0.0
    term = lesson.term(variant, weight)
    if share is not None:
        weights = list(teacher.parameters.values())
        sizes = [
            torch.cat(
                [v.flatten() for v in torch.autograd.grad(part, weights, retain_graph=True, materialize_grads=True)]
            )
            .nan_to_num()
            .norm()
            for part in (auxiliary, term)
        ]
        term = share * (sizes[0] / sizes[1]).detach() * term
    teacher.descend(auxiliary + term)
    example = pairs.constants(teacher.answers(BATCH))
    student.descend(imitation.loss(student.answers(BATCH), example, BATCH["labels"]).mean())


def start(warm: int = 0, **options):
    """Two learners, and the same in plain torch, after some steps that fill AdamW's moments."""
    student, teacher = pairs.pair(**options)
    for number in range(warm):
        for who in (student, teacher):
            loss = lambda batch, who=who: pilot.task_loss(models.outputs(who.module, batch), batch)  # noqa: E731
            who.minimise(loss, exact.batch(6, 10 + number))
    for who in (student, teacher):  # the schedule moves the rate between steps; the plain ones have none
        for group in who.optimizer.param_groups:
            group["lr"] = pairs.RATE
    return (student, teacher), (pairs.Plain(student), pairs.Plain(teacher))


def chosen(imitation=MIXTURE, weight=1.0, share=None, **others) -> LGTM:
    weight = weight if share is None else None
    return replace(imitation, influence_weight=weight, influence_share=share, **others)


def both(variant, imitation=MIXTURE, auxiliary=True, warm=0, rule="sgd", weight=1.0, share=None):
    """A step of ours and of the algorithm, from the same start."""
    ours, plain = start(warm)
    rate = pairs.RATE if rule == "adamw" else FAR
    options = {"influence": variant, "auxiliary": auxiliary, "pilot_rule": rule, "pilot_learning_rate": rate}
    settings = chosen(imitation, weight, share, **options)
    values = lgtm(*ours, settings)(BATCH, FEEDBACK)
    number = {"student_rate": (1 - imitation.alpha) * rate, "teacher_rate": pairs.RATE}.get(weight, weight)
    algorithm_1(*plain, settings, variant, number, share, rule, rate)
    return values, ours, plain


def agree(result, tolerance=1e-9) -> bool:
    _, ours, plain = result
    return all(pairs.difference(*two) < tolerance for two in zip(ours, plain, strict=True))


def teachers_gradient(variant, **settings):
    """The gradient that the teacher of `lgtm` would descend, and the lesson that it comes from."""
    (student, teacher), plain = start()
    kept = []

    def keep(loss, batch):
        weights = list(models_of(teacher))
        kept.extend(torch.autograd.grad(loss(batch).mean(), weights, materialize_grads=True))

    teacher.minimise = keep
    options = {"influence": variant, "auxiliary": False, "pilot_learning_rate": FAR, **settings}
    lgtm(student, teacher, replace(MIXTURE, **options))(BATCH, FEEDBACK)
    return kept, Lesson(*plain, MIXTURE), list(plain[1].parameters.values())


def models_of(who):
    return [parameter for parameter in who.module.parameters() if parameter.requires_grad]


# --- Exactness -----------------------------------------------------------------------------------------------------


def of_all(*thorough: str) -> list[tuple[str, str]]:
    """Every variant with labels and logits; these variants, which use the student's loss differently, with all else."""
    names = {variant: IMITATIONS if variant in thorough else ["kl with labels"] for variant in VARIANTS}
    return [(variant, name) for variant in VARIANTS for name in names[variant]]


@pytest.mark.parametrize(("variant", "imitation"), of_all("weighted", "meta"))
def test_a_step_is_that_of_algorithm_1(variant, imitation):
    assert agree(both(variant, IMITATIONS[imitation]))


@pytest.mark.parametrize(("variant", "imitation"), [*of_all(), ("meta", "probability mse with pkd"), ("meta", "dist")])
def test_with_the_pilot_step_of_adamw_too(variant, imitation):
    assert agree(both(variant, IMITATIONS[imitation], warm=2, rule="adamw"))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("weighted", {"weight": 0.3}),
        ("meta", {"weight": "student_rate"}),
        ("released", {"weight": "teacher_rate"}),
        *((variant, {"share": 0.5}) for variant in VARIANTS),
        ("printed", {"share": 0.0}),
    ],
    ids=str,
)
def test_every_weight_is_what_it_says(variant, options):
    assert agree(both(variant, **options))


@pytest.mark.parametrize("variant", ["weighted", "printed", "meta"])
def test_without_an_auxiliary_loss_too(variant):
    assert agree(both(variant, auxiliary=False))


def test_double_backward_is_exact_and_differences_are_close():
    """In float64 a difference at the radius that suits float32; the one-sided one is off by the first order."""
    exact_one = teachers_gradient("weighted")[0]
    ways = ("double-backward", "finite-difference", "forward-difference")
    errors = {way: exact.error(teachers_gradient("weighted", tangent=way)[0], exact_one) for way in ways}
    assert errors["double-backward"] < 1e-12
    assert 1e-9 < errors["finite-difference"] < 1e-3
    assert errors["finite-difference"] < errors["forward-difference"] < 0.1


def test_the_released_preset_is_the_released_code():
    """Two students moved by ±R along v, and the difference of the teacher's losses there, as the code has it."""
    ours, (student, teacher) = start(warm=3)
    lgtm(*ours, RELEASED)(BATCH, FEEDBACK)
    loss_of_teacher = lambda theirs, logits: 0.4 * losses.kl_divergence(theirs.logits, logits)  # noqa: E731
    with torch.no_grad():
        lesson = teacher.answers(BATCH)
    loss = losses.kl_divergence(student.answers(BATCH).logits, lesson.logits)
    gradient = torch.autograd.grad(loss, list(student.parameters.values()), materialize_grads=True)
    state = pilot.adamw_state(student.optimizer, student.parameters, pairs.RATE)
    copy = pilot.adamw(student.parameters, dict(zip(student.parameters, gradient, strict=True)), state)
    copy = {name: value.detach().requires_grad_() for name, value in copy.items()}
    held = F.cross_entropy(student.answers(FEEDBACK, copy).logits, FEEDBACK["labels"])
    v = torch.autograd.grad(held, list(copy.values()), materialize_grads=True)
    r = 0.01 / torch.cat([value.flatten() for value in v]).norm()

    theirs, differences = teacher.answers(BATCH), []
    for sign in (1, -1):
        steps = zip(student.parameters.items(), v, strict=True)
        moved = {name: (value + sign * r * slope).detach() for (name, value), slope in steps}
        differences.append(loss_of_teacher(theirs, student.answers(BATCH, moved).logits))
    own = loss_of_teacher(theirs, student.answers(BATCH).logits.detach())
    own = own + 0.6 * F.cross_entropy(theirs.logits, BATCH["labels"])
    teacher.descend(own - pairs.RATE * (differences[0] - differences[1]) / (2 * r))
    student.descend(losses.kl_divergence(student.answers(BATCH).logits, teacher.answers(BATCH).logits.detach()))
    assert all(pairs.difference(*two) < 1e-5 for two in zip(ours, (student, teacher), strict=True))
    ratio = lgtm(*start(warm=3)[0], replace(RELEASED, observe=True))(BATCH, FEEDBACK)["influence_ratio"]
    assert ratio > 1e-4  # else the last lines would compare nothing


# --- Planted mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "falls"), [("meta", True), ("printed", False)])
def test_descending_meta_lowers_the_pilots_feedback_loss_and_printed_raises_it(variant, falls):
    """The sign: the same lesson again, from the new teacher."""
    student, teacher = pairs.pair(rate=1e-4)
    beginning = pairs.weights(student)
    step = lgtm(student, teacher, replace(MIXTURE, influence=variant, auxiliary=False, pilot_learning_rate=FAR))
    values = []
    for _ in range(4):
        student.module.load_state_dict(beginning)
        values.append(step(BATCH, FEEDBACK)["feedback_loss"])
    assert values == sorted(values, reverse=falls)


def test_the_weights_of_eq_9_are_held_fixed():
    """A forgotten detach would add the mean of ℓ_i ∇I_i."""
    actual, lesson, weights = teachers_gradient("weighted")
    influences, values = lesson.influences(lesson.distillation(), lesson.g), lesson.distillation()
    gradients = [
        torch.autograd.grad((part * values).mean(), weights, retain_graph=True, materialize_grads=True)
        for part in (influences.detach(), influences)
    ]
    assert exact.error(actual, gradients[0]) < 1e-9
    assert exact.error(gradients[1], gradients[0]) > 0.1


def test_every_sample_has_its_own_weight():
    """The batch's mean as the one weight, as in the reading of eq. (19), is something else."""
    actual, lesson, weights = teachers_gradient("weighted")
    influences, values = lesson.influences(lesson.distillation(), lesson.g).detach(), lesson.distillation()
    expected = sum(
        (weight / len(values))
        * torch.cat([v.flatten() for v in torch.autograd.grad(value, weights, retain_graph=True)])
        for weight, value in zip(influences, values, strict=True)
    )
    assert exact.error(torch.cat([v.flatten() for v in actual]), expected) < 1e-9
    shared = torch.autograd.grad((influences.mean() * values).mean(), weights)
    assert exact.error(torch.cat([v.flatten() for v in shared]), expected) > 0.1


def seen_by(imitation=MIXTURE, **settings):
    """Influences and answers that `watch` was told of, and the plain networks from before the step."""
    ours, plain = start()
    seen = []
    options = {"pilot_learning_rate": FAR, **settings}
    values = lgtm(*ours, replace(imitation, **options), lambda *what: seen.append(what))(BATCH, FEEDBACK)
    (batch, influences, own, lesson), *others = seen
    assert batch is BATCH and not others and not influences.requires_grad
    return influences, own, lesson, values, plain


def test_influence_is_that_of_the_student_before_the_pilot_step_along_the_feedback_gradient_after_it():
    influences, own, lesson, values, (student, teacher) = seen_by()
    weights = models.trainable(student.module)
    taught = lambda outputs, batch: MIXTURE.loss(outputs, pairs.constants(teacher.answers(BATCH)), batch["labels"])  # noqa: E731
    copy = pilot.sgd_step(student.module, weights, BATCH, taught, FAR)
    places = {"before": weights, "after": copy}

    def expected(place, slope_at):
        g = feedback_gradient(student.module, places[slope_at], FEEDBACK)
        loss = lambda outputs, batch: losses.kl_divergence(outputs.logits, batch["lesson"], 2.0, reduction="none")  # noqa: E731
        gradients = influence.per_sample_gradients(
            student.module, places[place], BATCH | {"lesson": teacher.answers(BATCH).logits.detach()}, loss
        )
        return sum(gradients[name].flatten(1) @ g[name].flatten() for name in g)

    assert exact.error(influences, expected("before", "after")) < 1e-10
    for wrong in (("before", "before"), ("after", "after")):
        assert exact.error(influences, expected(*wrong)) > 1e-3
    assert values["influence_mean"] == pytest.approx(influences.mean().item(), rel=1e-5)
    assert values["influence_std"] == pytest.approx(influences.std(correction=0).item(), rel=1e-5)
    assert values["influence_positive"] == pytest.approx((influences > 0).double().mean().item())
    quizzed = pilot.task_loss(models.apply(student.module, copy, FEEDBACK), FEEDBACK).mean()
    assert values["feedback_loss"] == pytest.approx(quizzed.item(), rel=1e-10)
    assert exact.error(own.logits, student.answers(BATCH).logits) < 1e-12
    assert exact.error(lesson.logits, teacher.answers(BATCH).logits) < 1e-12


def test_the_influence_of_dist_is_that_of_the_samples_part_of_the_batchs_loss():
    """Its samples do not stand alone, so a gradient of one sample's batch would not do."""
    influences, *_, (student, teacher) = seen_by(IMITATIONS["dist"])
    lesson = Lesson(student, teacher, IMITATIONS["dist"])
    assert exact.error(influences, lesson.influences(lesson.distillation(), lesson.g)) < 1e-9


# --- Relatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("imitated", "rule"), [("kl with labels", "sgd"), ("probability mse with pkd", "adamw")], ids=str
)
def test_meta_at_the_students_rate_and_nothing_else_is_metadistil(imitated, rule):
    ends = []
    for method in (lgtm, metadistil):
        student, teacher = start(warm=2)[0]
        if method is lgtm:
            options = {"influence": "meta", "influence_weight": "student_rate", "auxiliary": False}
            step = lgtm(student, teacher, LGTM(**STUDENTS[imitated], **options, pilot_rule=rule))
        else:
            step = metadistil(student, teacher, MetaDistil(**STUDENTS[imitated], pilot_rule=rule))
        for _ in range(2):
            step(BATCH, FEEDBACK)
        ends.append((pairs.weights(student), pairs.weights(teacher)))
    assert exact.error(*(end[0] for end in ends)) < 1e-10
    assert exact.error(*(end[1] for end in ends)) < 1e-10


@pytest.mark.parametrize(
    ("variant", "off"),
    [("weighted", {"weight": 0.0}), ("meta", {"share": 0.0}), ("released", {"weight": 0.0})],
    ids=str,
)
def test_at_weight_zero_it_is_online_distillation_dropout_included(variant, off):
    ends = []
    for method in ("lgtm", "online"):
        student, teacher = start(dropout=0.3)[0]
        torch.manual_seed(0)
        step = online_distillation(student, teacher, AUXILIARY)
        if method == "lgtm":
            step = partial(lgtm(student, teacher, chosen(influence=variant, **off)), feedback=FEEDBACK)
        for _ in range(2):
            step(BATCH)
        ends.append((pairs.weights(student), pairs.weights(teacher)))
    assert exact.error(*(end[0] for end in ends)) < 1e-10
    assert exact.error(*(end[1] for end in ends)) < 1e-10


# --- What saves time -------------------------------------------------------------------------------------------------


def test_between_two_looks_at_the_feedback_a_step_is_that_of_online_distillation():
    """feedback_every=3: the first and the fourth step have an influence term, the others have none."""
    student, teacher = start(dropout=0.3)[0]
    step = lgtm(student, teacher, replace(MIXTURE, feedback_every=3))
    looked = []
    for number in range(5):
        twins = start(dropout=0.3)[0]
        for who, twin in zip((student, teacher), twins, strict=True):
            twin.module.load_state_dict(who.module.state_dict())
            twin.optimizer.load_state_dict(deepcopy(who.optimizer.state_dict()))
        torch.manual_seed(number)
        values = step(BATCH, FEEDBACK)
        looked.append("feedback_loss" in values and "influence_mean" in values)
        torch.manual_seed(number)
        online_distillation(*twins, AUXILIARY)(BATCH)
        gap = exact.error(models.trainable(teacher.module), models.trainable(twins[1].module))
        assert (gap > 1e-6) if looked[-1] else (gap < 1e-10)
    assert looked == [True, False, False, True, False]


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_influence_through_the_last_layers_is_the_part_of_the_inner_product_there(layers, rule):
    settings = {"pilot_rule": rule, "pilot_learning_rate": pairs.RATE if rule == "adamw" else FAR}
    influences, *_, (student, teacher) = seen_by(feedback_layers=layers, **settings)
    lesson = Lesson(student, teacher, MIXTURE, rule, settings["pilot_learning_rate"])
    kept = set(models.last_layers(student.module, layers))
    parts = zip(student.parameters, lesson.g_of_the_rule, strict=True)
    g = [value if name in kept else torch.zeros_like(value) for name, value in parts]
    assert 0 < len(kept) < len(g)
    assert exact.error(influences, lesson.influences(lesson.distillation(), g)) < 1e-9


def test_every_rate_is_that_of_its_own_network_and_its_own_schedule():
    """The student's for the pilot and for "student_rate", the teacher's for "teacher_rate"; the student counts."""
    rates = {"student": 0.3, "teacher": 0.02}
    for name, weight in (("student_rate", 0.7 * rates["student"]), ("teacher_rate", rates["teacher"])):
        ends = []
        for options in ({"weight": name}, {"weight": weight, "pilot_learning_rate": rates["student"]}):
            learners = start()[0]
            for who in learners:
                who.optimizer.param_groups[0]["lr"] = rates[who.name]
            lgtm(*learners, chosen(influence="meta", **options))(BATCH, FEEDBACK)
            ends.append([pairs.weights(who) for who in learners])
        assert exact.error(*ends) < 1e-12
    student, teacher = start()[0]
    step = lgtm(student, teacher, replace(MIXTURE, feedback_every=2))
    pilot_first = lambda batch: pilot.task_loss(models.outputs(teacher.module, batch), batch)  # noqa: E731
    teacher.minimise(pilot_first, BATCH)  # a teacher that has learned before: its schedule is one step ahead
    assert ["feedback_loss" in step(BATCH, FEEDBACK) for _ in range(3)] == [True, False, True]


def passes(**settings) -> dict[str, int]:
    """How often a step runs the teacher and the student forward, and the teacher backward."""
    student, teacher = start()[0]
    calls = {"teacher": 0, "student": 0, "backward": 0}

    def count(name):
        calls[name] += 1

    for who in (student, teacher):
        who.module.register_forward_hook(lambda *_, name=who.name: count(name))
    teacher.module.classifier.weight.register_hook(lambda _: count("backward"))
    lgtm(student, teacher, chosen(**settings))(BATCH, FEEDBACK)
    return calls


def test_one_backward_pass_of_the_teacher_does_for_all():
    """The teacher: its answers before and after its step.  The student: pilot, feedback, tangent, its own step."""
    assert passes() == {"teacher": 2, "student": 4, "backward": 1}
    assert passes(share=0.1) == {"teacher": 2, "student": 4, "backward": 3}


def test_the_forward_difference_reuses_the_pilots_pass():
    assert passes(tangent="finite-difference") == {"teacher": 2, "student": 5, "backward": 1}
    assert passes(tangent="forward-difference") == {"teacher": 2, "student": 4, "backward": 1}


# --- What a step leaves alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pilot_rule": "adamw"}, {"influence": "released"}], ids=str)
def test_the_pilot_leaves_student_optimiser_schedule_and_random_state_alone(settings):
    student, teacher = pairs.pair(dropout=0.5)
    step = lgtm(student, teacher, chosen(**settings))
    step(BATCH, FEEDBACK)
    before, seen = pairs.state(student), []
    original = teacher.minimise

    def look(loss, batch):
        seen.append(pairs.same(pairs.state(student), before))
        return original(loss, batch)

    teacher.minimise = look
    torch.manual_seed(3)
    teacher.module(**{name: BATCH[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    random = torch.get_rng_state()
    torch.manual_seed(3)
    teacher.minimise = lambda loss, batch: (look(loss, batch), seen.append(torch.equal(torch.get_rng_state(), random)))
    step(BATCH, FEEDBACK)  # the teacher's one pass draws its dropout, nothing else draws anything
    assert seen == [True, True]
    assert all(part.training for who in (student, teacher) for part in who.module.modules())


def test_observing_changes_nothing_and_measures():
    ends = []
    for observe in (False, True):
        torch.manual_seed(0)
        student, teacher = pairs.pair(dropout=0.3)
        step = lgtm(student, teacher, chosen(influence="meta", weight=0.2, observe=observe))
        values = [step(BATCH, FEEDBACK) for _ in range(2)]
        ends.append((pairs.weights(student), pairs.weights(teacher)))
    assert pairs.same(*ends)
    assert values[-1]["influence_weight"] == 0.2 and values[-1]["influence_ratio"] > 0
    assert -1 <= values[-1]["influence_cosine"] <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_observed_are_the_two_gradients_that_the_teacher_adds_up(variant):
    """Ratio and cosine from plain autograd; losses and entropies from the answers before the step."""
    ours, (student, teacher) = start()
    settings = chosen(influence=variant, weight=0.2, observe=True, pilot_learning_rate=FAR)
    values = lgtm(*ours, settings)(BATCH, FEEDBACK)
    lesson, weights = Lesson(student, teacher, MIXTURE), list(teacher.parameters.values())
    auxiliary = lesson.auxiliary()
    first, second = (
        torch.cat([v.flatten() for v in torch.autograd.grad(part, weights, retain_graph=True, materialize_grads=True)])
        for part in (auxiliary, lesson.term(variant, 0.2))
    )
    cosine = (first @ second / first.norm() / second.norm()).item()
    assert values["influence_cosine"] == pytest.approx(cosine, abs=1e-6) and abs(cosine) > 0.01
    assert values["influence_ratio"] == pytest.approx((second.norm() / first.norm()).item(), rel=1e-6)
    assert values["teacher_loss"] == pytest.approx(auxiliary.item(), rel=1e-9)
    for name, outputs in (("student", lesson.ours), ("teacher", lesson.theirs)):
        entropy = torch.distributions.Categorical(logits=outputs.logits).entropy().mean().item()
        assert values[f"{name}_entropy"] == pytest.approx(entropy, rel=1e-6)


@pytest.mark.parametrize("options", [{"share": 0.5}, {"observe": True}], ids=str)
def test_a_teacher_with_frozen_weights_can_be_measured(options):
    student, teacher = pairs.pair()
    embeddings = teacher.module.bert.embeddings.requires_grad_(False)
    before = {name: p.clone() for name, p in embeddings.named_parameters()}
    teacher = learner("teacher", teacher.module, teacher.accelerator, pairs.RATE, 100, warmup_ratio=0.0)
    values = lgtm(student, teacher, chosen(**options))(BATCH, FEEDBACK)
    assert math.isfinite(values["influence_ratio"]) and values["influence_ratio"] > 0
    assert pairs.same(dict(embeddings.named_parameters()), before)


def test_the_released_preset_names_what_the_released_code_does():
    """At equal rates two of the weights are one number, and a difference is close to a derivative: names tell."""
    named = {
        "alpha": 0.0,
        "temperature": 1.0,
        "objective": "kl",
        "pkd_weight": 0.0,
        "teacher_alpha": 0.6,
        "teacher_objective": "kl",
        "influence": "released",
        "influence_weight": "teacher_rate",
        "influence_share": None,
        "pilot_rule": "adamw",
        "tangent": "finite-difference",
    }
    assert {name: getattr(RELEASED, name) for name in named} == named


def test_a_share_is_the_ratio_that_is_measured():
    student, teacher = pairs.pair()
    values = lgtm(student, teacher, chosen(share=0.25))(BATCH, FEEDBACK)
    assert values["influence_ratio"] == pytest.approx(0.25)
    at_one = lgtm(*pairs.pair(), replace(MIXTURE, observe=True))(BATCH, FEEDBACK)
    assert values["influence_weight"] == pytest.approx(0.25 / at_one["influence_ratio"])


def test_where_the_lesson_changes_nothing_there_is_no_share():
    """Zero over zero is none: behind a classifier of zeros the student's answers do not move, so I_i = 0 for all."""
    student, teacher = pairs.pair()
    nn.init.zeros_(student.module.classifier.weight), nn.init.zeros_(student.module.classifier.bias)
    student.module.requires_grad_(False)
    student.module.bert.pooler.dense.weight.requires_grad_(True)
    values = lgtm(student, teacher, chosen(share=0.5))(BATCH, FEEDBACK)
    assert values["influence_mean"] == 0.0 and values["influence_weight"] == 0.0
    assert all(value.isfinite().all() for value in pairs.weights(teacher).values())


@pytest.mark.parametrize(("options", "inside"), [({}, torch.float32), ({"tangent_precision": "autocast"}, HALF)])
def test_pilot_feedback_and_tangent_run_in_the_precision_they_are_given_and_everything_else_as_in_training(
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
            gradients.append(torch.autograd.grad(loss(batch).mean(), models_of(teacher), materialize_grads=True))

        teacher.minimise = keep
        passes = pairs.precisions(student, teacher)
        step = lgtm(student, teacher, chosen(influence="meta", auxiliary=False, feedback_every=2, **options))
        step(BATCH, FEEDBACK)
        looked, passes[:] = list(passes), []
        step(BATCH, FEEDBACK)
    trial = [("student", inside)] * 3  # the pilot, the feedback, the tangent
    assert looked == [("teacher", HALF), *trial, ("teacher", HALF), ("student", HALF)]
    assert passes == [("teacher", HALF), ("student", HALF), ("teacher", HALF), ("student", HALF)]
    assert 0 < exact.error(gradients[2], gradients[0]) < 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"influence": "wieghted"}, "influence is 'wieghted'; expected one of weighted, printed, meta, released"),
        (
            {"influence_weight": "student"},
            "influence_weight is 'student'; expected a number ≥ 0 or one of student_rate",
        ),
        ({"influence_weight": -1.0}, "influence_weight is -1.0"),
        ({"influence_weight": float("nan")}, "influence_weight is nan"),
        ({"influence_weight": float("inf")}, "influence_weight is inf"),
        ({"influence_share": -0.1}, "influence_share is -0.1"),
        ({"influence_share": float("inf")}, "influence_share is inf"),
        ({"influence_share": 0.1, "influence_weight": 0.1}, "influence_weight and influence_share are both given"),
        ({"pilot_rule": "adam"}, "pilot_rule is 'adam'; expected one of sgd, adamw"),
        ({"feedback_every": 0}, "feedback_every is 0"),
        ({"alpha": 1.0}, "no teacher can influence it"),
        ({"auxiliary": False, "influence_share": 0.1}, "nothing to take a share of"),
        ({"auxiliary": False, "observe": True}, "or to compare with"),
        ({"auxiliary": False, "influence": "released"}, "nor a loss of the teacher"),
        ({"teacher_objective": "mse"}, "teacher_objective is 'mse'; expected one of kl"),
        ({"feedback_layers": -1}, "feedback_layers is -1"),
        ({"pilot_pieces": 2, "objective": "dist"}, "pilot_pieces is 2: objective 'dist'"),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(wrong, message):
    with pytest.raises(ValidationError):
        LGTM(**wrong)
    assert message in checked(LGTM, wrong)[1][0]


def test_more_layers_than_the_student_has_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="layers is 3, but the network has 2"):
        lgtm(*pairs.pair(), replace(MIXTURE, feedback_layers=3))


def test_defaults_that_depend_on_other_fields():
    assert (LGTM().influence_weight, LGTM().pilot_rule) == (1.0, "sgd")
    released = LGTM(influence="released")
    assert (released.influence_weight, released.pilot_rule) == ("teacher_rate", "adamw")
    assert LGTM(influence_share=0.1).influence_weight is None


@pytest.mark.parametrize("influence", VARIANTS)
def test_in_pieces_the_step_is_the_same(influence):
    ends, sizes = [], []
    for pieces in (1, 4):
        student, teacher = pairs.pair()
        student.module.register_forward_hook(lambda *what: sizes.append(len(what[-1].logits)))
        logged = lgtm(student, teacher, chosen(influence=influence, pilot_pieces=pieces))(BATCH, FEEDBACK)
        ends.append((pairs.weights(student), pairs.weights(teacher), torch.tensor(list(logged.values()))))
    assert exact.error(*ends) < 1e-9
    assert sizes == [6, 6, 6, 6] + [2, 2, 1, 1] * 2 + [6, 6]  # pilot, feedback, tangent, the student's own step


@pytest.mark.parametrize("who", [0, 1])
def test_micro_batches_of_either_network_are_refused(who):
    both = pairs.pair()
    both[who].micro_batches = 2
    with pytest.raises(ValueError, match="micro_batches is 2"):
        lgtm(*both, MIXTURE)
