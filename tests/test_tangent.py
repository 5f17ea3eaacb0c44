"""Tangents, influences and the meta-gradient, each against a way that shares no step with the one tested."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from kdlib import influence, losses, models, pilot
from kdlib.tangent import (
    distillation_influence,
    feedback_gradient,
    hessian_vector_product,
    influence_along,
    meta_gradient_loss,
    student_tangent,
)
from tests import exact
from tests.test_pilot import assert_untouched, frozen

METHODS = ("jvp", "finite-difference", "double-backward")  # the one-sided difference has tests of its own
FINE = 1e-4  # the radius that suits float64

STUDENT, TEACHER = exact.bert(0), exact.bert(1)
BATCH, FEEDBACK = exact.batch(5, seed=0), exact.batch(4, seed=1)
PARAMETERS = models.trainable(STUDENT)
LEARNING_RATE = 0.05


def teacher_outputs(parameters=None, batch=BATCH):
    with models.evaluating(TEACHER), models.exact_attention(TEACHER):
        return models.apply(TEACHER, parameters or {}, batch, hidden_states=True)


def as_loss(objective):
    """The objective as a loss of the student's outputs and a batch that carries the teacher's."""

    def loss(outputs, batch):
        teacher = models.Outputs(batch["teacher_logits"], batch["teacher_states"].unbind(1))
        return objective(outputs, teacher, batch["labels"])

    return loss


with torch.no_grad():
    FROM_TEACHER = teacher_outputs()
FULL = BATCH | {"teacher_logits": FROM_TEACHER.logits, "teacher_states": torch.stack(FROM_TEACHER.hidden_states, 1)}
GRADIENT = feedback_gradient(STUDENT, PARAMETERS, FEEDBACK)
KL = partial(losses.kl_divergence, temperature=2.0, reduction="none")


@pytest.fixture(scope="module")
def tangents():
    """By method: outputs and tangents along the feedback gradient, with everything that can be asked for."""
    return {
        method: student_tangent(STUDENT, PARAMETERS, BATCH, GRADIENT, method, FINE, hidden_states=True, attentions=True)
        for method in METHODS
    }


@pytest.fixture(scope="module")
def per_sample():
    """By objective: the gradients of the samples, one backward pass each."""
    return {
        name: gradients_of_parts(objective)
        if any(other in name for other in losses.BATCH_OBJECTIVES)
        else influence.per_sample_gradients(STUDENT, PARAMETERS, FULL, as_loss(objective), hidden_states=True)
        for name, objective in exact.CASES.items()
    }


def gradients_of_parts(objective):
    """The same where samples do not stand alone: the gradients of the values that the whole batch has."""
    leaves = {name: value.clone().requires_grad_() for name, value in PARAMETERS.items()}
    with models.evaluating(STUDENT):
        values = as_loss(objective)(models.apply(STUDENT, leaves, FULL, hidden_states=True), FULL)
    rows = [
        torch.autograd.grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True) for value in values
    ]
    return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}


class TestStudentTangent:
    @pytest.mark.parametrize(("method", "bound"), [("double-backward", 1e-10), ("finite-difference", 1e-6)])
    @pytest.mark.parametrize("what", ["logits", "hidden_states", "attentions"])
    def test_the_methods_agree(self, tangents, method, bound, what):
        actual, expected = (getattr(tangents[m][1], what) for m in (method, "jvp"))
        assert exact.error(actual, expected) < bound

    @pytest.mark.parametrize("method", METHODS)
    def test_the_outputs_are_the_students_own(self, tangents, method):
        student = exact.bert().eval()
        inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        student.set_attn_implementation("eager")
        own = student(**inputs, output_hidden_states=True, output_attentions=True)
        outputs = tangents[method][0]
        assert exact.error(outputs.logits, own.logits) < 1e-14
        assert exact.error(outputs.hidden_states, own.hidden_states) < 1e-14
        assert exact.error(outputs.attentions, own.attentions) < 1e-14

    @pytest.mark.parametrize("method", METHODS)
    def test_shapes_follow_what_is_asked_for(self, tangents, method):
        outputs, tangent = student_tangent(STUDENT, PARAMETERS, BATCH, GRADIENT, method)
        assert outputs.logits.shape == tangent.logits.shape == (5, 3)
        assert tangent.hidden_states == tangent.attentions == ()
        full = tangents[method][1]
        assert [len(full.hidden_states), len(full.attentions)] == [3, 2]

    @pytest.mark.parametrize("method", METHODS)
    def test_nothing_of_the_module_changes(self, method):
        student, batch = exact.bert(), exact.batch()
        student.bert.pooler.eval()
        before, parameters = frozen(student), dict(student.named_parameters())
        pointers = {name: value.data_ptr() for name, value in parameters.items()}
        outputs, tangent = student_tangent(student, parameters, batch, GRADIENT, method)
        assert_untouched(student, before)
        assert {name: value.data_ptr() for name, value in student.named_parameters()} == pointers
        assert not outputs.logits.requires_grad and not tangent.logits.requires_grad

    @pytest.mark.parametrize("method", METHODS)
    def test_the_module_is_restored_after_an_error(self, method):
        student = exact.bert()
        before = frozen(student)
        with pytest.raises(IndexError):
            student_tangent(student, PARAMETERS, BATCH | {"input_ids": BATCH["input_ids"] + 1000}, GRADIENT, method)
        assert_untouched(student, before)

    @pytest.mark.parametrize("method", METHODS)
    def test_dropout_is_off(self, tangents, method):
        """The student of these tests is in training mode and drops half; its twin drops nothing."""
        assert STUDENT.training and STUDENT.config.hidden_dropout_prob == 0.5
        twin = exact.bert(dropout=0.0).eval()
        expected = student_tangent(twin, PARAMETERS, BATCH, GRADIENT)[1].logits
        assert exact.error(tangents[method][1].logits, expected) < 1e-6

    @pytest.mark.parametrize("method", METHODS)
    def test_a_zero_direction_gives_zeros(self, method):
        zero = {name: torch.zeros_like(value) for name, value in PARAMETERS.items()}
        outputs, tangent = student_tangent(STUDENT, PARAMETERS, BATCH, zero, method, hidden_states=True)
        assert outputs.logits.abs().sum() > 0
        assert all((value == 0).all() for value in (tangent.logits, *tangent.hidden_states))

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_finite_differences_do_not_depend_on_the_directions_size(self, tangents, size):
        scaled = {name: size * value for name, value in GRADIENT.items()}
        tangent = student_tangent(STUDENT, PARAMETERS, BATCH, scaled, "finite-difference", FINE)[1]
        assert exact.error(tangent.logits / size, tangents["jvp"][1].logits) < 1e-6

    def test_the_one_sided_difference_is_off_by_the_first_order_and_saves_a_pass(self, tangents):
        """Half the radius, half the error; the central difference's is quartered."""
        outputs, calls = tangents["jvp"][0], []
        student = exact.bert()
        student.register_forward_hook(lambda *_: calls.append(1))

        def error_at(method, radius):
            known, tangent = student_tangent(
                student, PARAMETERS, BATCH, GRADIENT, method, radius, models.Outputs(outputs.logits)
            )
            assert known.logits is outputs.logits
            return exact.error(tangent.logits, tangents["jvp"][1].logits)

        for method, factor, passes in (("forward-difference", 2, 1), ("finite-difference", 4, 2)):
            calls.clear()
            errors = [error_at(method, radius) for radius in (2e-3, 1e-3)]
            assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)
            assert len(calls) == 2 * passes
        alone = student_tangent(student, PARAMETERS, BATCH, GRADIENT, "forward-difference", FINE)
        assert exact.error(alone[0].logits, outputs.logits) < 1e-12
        assert exact.error(alone[1].logits, tangents["jvp"][1].logits) < 1e-2
        zero = {name: torch.zeros_like(value) for name, value in PARAMETERS.items()}
        still = student_tangent(student, PARAMETERS, BATCH, zero, "forward-difference")[1]
        assert (still.logits == 0).all()

    @settings(max_examples=8)
    @given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(["jvp", "double-backward"]))
    def test_is_linear_in_the_direction(self, a, b, method):
        u, v = exact.direction(PARAMETERS, 1), GRADIENT
        along = partial(student_tangent, STUDENT, PARAMETERS, BATCH, method=method)
        combined = along({name: a * u[name] + b * v[name] for name in u})[1].logits
        expected = a * along(u)[1].logits + b * along(v)[1].logits
        torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_sign_of_the_entries_does_not_matter_to_the_size_of_a_direction(self, method):
        """Here no entry is positive and many are zero, so that the largest one is no measure of the size."""
        head = {name: value for name, value in PARAMETERS.items() if name.startswith("classifier")}
        v = {name: GRADIENT[name].abs() for name in head}
        v["classifier.bias"] = torch.zeros_like(v["classifier.bias"])
        along = partial(student_tangent, STUDENT, head, BATCH, method=method)
        behind = along({name: -value for name, value in v.items()})[1].logits
        assert behind.abs().sum() > 0
        torch.testing.assert_close(behind, -along(v)[1].logits, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize(
        ("method", "asked", "fast"),
        [
            ("jvp", False, False),
            ("double-backward", False, False),
            ("finite-difference", False, True),
            ("forward-difference", False, True),
            ("finite-difference", True, False),
        ],
    )
    def test_plain_passes_take_the_fast_attention_unless_its_weights_are_asked_for(self, method, asked, fast):
        student, seen = exact.bert(), []
        student.register_forward_hook(lambda module, *_: seen.append(module.config._attn_implementation))
        student_tangent(student, PARAMETERS, BATCH, GRADIENT, method, attentions=asked)
        assert {name == "sdpa" for name in seen} == {fast}

    @settings(max_examples=6)
    @given(st.integers(1, 6), st.sampled_from(METHODS))
    def test_padding_changes_nothing(self, columns, method):
        padded = {name: F.pad(value, (0, columns)) if value.dim() == 2 else value for name, value in BATCH.items()}
        plain, longer = (
            student_tangent(STUDENT, PARAMETERS, batch, GRADIENT, method, FINE)[1].logits for batch in (BATCH, padded)
        )
        assert exact.error(longer, plain) < 1e-8

    @pytest.mark.parametrize("method", METHODS)
    def test_other_modules_work_too(self, method):
        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

            def forward(self, x):
                return self.head(self.layer(x)[:, 0])

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = exact.bert()

            def forward(self, input_ids, attention_mask):
                return self.inner(input_ids=input_ids, attention_mask=attention_mask)

        torch.manual_seed(0)
        x = torch.randn(4, 6, 8, dtype=torch.float64)
        for module, batch in [
            (Encoder().double(), {"x": x, "labels": torch.tensor([0, 1, 2, 0])}),
            (Wrapper(), BATCH),
            (exact.perceptron(), exact.features()),
        ]:
            before, parameters = frozen(module), models.trainable(module)
            v = exact.direction(parameters)
            tangent = student_tangent(module, parameters, batch, v, method, FINE)[1].logits

            def change(step, module=module, parameters=parameters, v=v, batch=batch):
                moved = {name: value + step * v[name] for name, value in parameters.items()}
                with torch.no_grad(), models.evaluating(module), models.exact_attention(module):
                    return models.apply(module, moved, batch).logits

            assert exact.error(tangent, (change(1e-5) - change(-1e-5)) / 2e-5) < 1e-6
            assert_untouched(module, before)

    def test_some_of_the_parameters_may_move(self):
        head = {name: value for name, value in PARAMETERS.items() if name.startswith("classifier")}
        v = exact.direction(head)
        for method in METHODS:
            outputs, tangent = student_tangent(STUDENT, head, BATCH, v, method, hidden_states=True)
            assert all((value == 0).all() for value in tangent.hidden_states)
            # The weights that stay are the module's own, which could learn.
            assert not any(value.requires_grad for value in (outputs.logits, *outputs.hidden_states, tangent.logits))
            with torch.no_grad(), models.evaluating(STUDENT):
                pooled = STUDENT.bert.pooler(outputs.hidden_states[-1])
            expected = pooled @ v["classifier.weight"].T + v["classifier.bias"]
            assert exact.error(tangent.logits, expected) < 1e-10

    @pytest.mark.parametrize(
        ("method", "bound"), [("jvp", 1e-5), ("finite-difference", 5e-3), ("double-backward", 1e-5)]
    )
    def test_float32_is_close(self, tangents, method, bound):
        student = exact.bert().float()
        for v in (GRADIENT, {name: value.float() for name, value in GRADIENT.items()}):  # of whatever precision
            tangent = student_tangent(student, models.trainable(student), BATCH, v, method)[1]
            assert tangent.logits.dtype == torch.float32
            assert exact.error(tangent.logits.double(), tangents["jvp"][1].logits) < bound

    @pytest.mark.parametrize(
        ("method", "bound"), [("jvp", 0.05), ("finite-difference", 0.5), ("double-backward", 0.05)]
    )
    def test_bfloat16_is_near(self, tangents, method, bound):
        student = exact.bert().float()
        v = {name: value.float() for name, value in GRADIENT.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tangent = student_tangent(student, models.trainable(student), BATCH, v, method)[1]
        assert tangent.logits.dtype == torch.float32
        assert exact.error(tangent.logits.double(), tangents["jvp"][1].logits) < bound

    @pytest.mark.usefixtures("unchecked")
    def test_an_unknown_method_is_named_with_the_nearest(self):
        with pytest.raises(ValueError, match=r"method is 'finite_difference': did you mean 'finite-difference'"):
            student_tangent(STUDENT, PARAMETERS, BATCH, GRADIENT, "finite_difference")
        with pytest.raises(ValueError, match=r"method is 'xyz': expected one of 'jvp', 'finite-difference'"):
            student_tangent(STUDENT, PARAMETERS, BATCH, GRADIENT, "xyz")

    def test_a_direction_that_does_not_fit_is_refused(self):
        along = partial(student_tangent, STUDENT, PARAMETERS, BATCH)
        with pytest.raises(ValueError, match=r"lacks classifier\.bias"):
            along({name: value for name, value in GRADIENT.items() if name != "classifier.bias"})
        with pytest.raises(ValueError, match="has head, which no parameter is called"):
            along(GRADIENT | {"head": torch.zeros(3)})
        with pytest.raises(ValueError, match=r"lacks .* and 38 more"):
            along({})
        with pytest.raises(ValueError, match=r"direction of classifier\.bias has shape \(2,\), the parameter \(3,\)"):
            along(GRADIENT | {"classifier.bias": torch.zeros(2)})
        with pytest.raises(ValueError, match=r"direction of classifier\.weight has shape"):
            along(GRADIENT | {"classifier.weight": GRADIENT["classifier.weight"].T})  # as many numbers
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"classifier\.bias has an entry that is {bad}"):
                along(GRADIENT | {"classifier.bias": torch.tensor([0.0, bad, 0.0], dtype=torch.float64)})
        for radius in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"radius is {radius}; expected a positive, finite number"):
                along(GRADIENT, "finite-difference", radius)


@pytest.mark.parametrize("name", exact.CASES)
class TestEveryObjective:
    def influences(self, tangents, name, method="jvp"):
        outputs, tangent = tangents[method]
        return distillation_influence(exact.CASES[name], outputs, tangent, FROM_TEACHER, BATCH["labels"])

    def test_influence_is_the_inner_product_with_each_samples_gradient(self, tangents, per_sample, name):
        gradients = per_sample[name]
        expected = sum((gradients[key].flatten(1) @ GRADIENT[key].flatten()) for key in GRADIENT)
        actual = self.influences(tangents, name)
        assert actual.shape == (5,)
        assert exact.error(actual, expected) < 1e-10

    def test_influence_by_the_other_methods(self, tangents, name):
        expected = self.influences(tangents, name)
        assert exact.error(self.influences(tangents, name, "double-backward"), expected) < 1e-10
        assert exact.error(self.influences(tangents, name, "finite-difference"), expected) < 1e-6

    def test_the_meta_gradient_is_the_gradient_through_the_pilot_step(self, name):
        """One plain step of the student and its feedback loss, differentiated in the teacher as a whole."""
        objective = exact.CASES[name]
        teacher = {key: value.requires_grad_() for key, value in models.trainable(TEACHER).items()}
        outputs = teacher_outputs(teacher)

        def loss(student, batch):
            return objective(student, outputs, batch["labels"])

        step = partial(pilot.sgd_step, STUDENT, PARAMETERS, BATCH, loss, LEARNING_RATE, hidden_states=True)
        through = step(create_graph=True)
        with models.evaluating(STUDENT), models.exact_attention(STUDENT):
            after = pilot.task_loss(models.apply(STUDENT, through, FEEDBACK), FEEDBACK).mean()
        variables = list(teacher.values())
        expected = torch.autograd.grad(after, variables, retain_graph=True, materialize_grads=True)

        g = feedback_gradient(STUDENT, step(), FEEDBACK)
        here, tangent = student_tangent(STUDENT, PARAMETERS, BATCH, g, hidden_states=True)
        influences = distillation_influence(objective, here, tangent, outputs, BATCH["labels"])
        total = meta_gradient_loss(influences, LEARNING_RATE)
        actual = torch.autograd.grad(total, variables, materialize_grads=True)
        if name == "labels only":  # which no teacher can change
            assert all((value == 0).all() for value in (*expected, *actual))
        else:
            assert exact.error(actual, expected) < 1e-10

    @settings(max_examples=4)
    @given(st.permutations(range(5)))
    def test_a_permutation_of_the_batch_permutes_the_influences(self, tangents, name, order):
        permuted = {key: value[order] for key, value in BATCH.items()}
        outputs, tangent = student_tangent(STUDENT, PARAMETERS, permuted, GRADIENT, hidden_states=True)
        teacher = teacher_outputs(batch=permuted)
        actual = distillation_influence(exact.CASES[name], outputs, tangent, teacher, permuted["labels"])
        torch.testing.assert_close(actual, self.influences(tangents, name)[order], rtol=1e-9, atol=1e-9)

    @settings(max_examples=5)
    @given(st.floats(-20, 20))
    def test_adding_a_constant_to_the_logits_changes_nothing(self, tangents, name, constant):
        """To the student's, its tangent's and the teacher's; a squared error of logits sees it in the tangent."""
        outputs, tangent = tangents["jvp"]
        shifted = outputs._replace(logits=outputs.logits + constant)
        moving = tangent._replace(logits=tangent.logits + (0 if "logit_mse" in name else constant))
        teacher = FROM_TEACHER._replace(logits=FROM_TEACHER.logits + constant)
        actual = distillation_influence(exact.CASES[name], shifted, moving, teacher, BATCH["labels"])
        torch.testing.assert_close(actual, self.influences(tangents, name), rtol=1e-8, atol=1e-8)


class TestDistillationInfluence:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_under_kl_it_is_the_teachers_mean_of_the_students_log_probability_tangent(self, tangents, temperature):
        """I_i = −T² Σ_c p_c ∂ log q_c, written out: a wrong direction of KL or a missing T² shows."""
        outputs, tangent = tangents["jvp"]
        dz = tangent.logits / temperature
        p, q = ((values / temperature).softmax(-1) for values in (FROM_TEACHER.logits, outputs.logits))
        change = dz - (q * dz).sum(-1, keepdim=True)  # of log q
        expected = -(temperature**2) * (p * change).sum(-1)
        objective = partial(losses.kl_divergence, temperature=temperature, reduction="none")
        actual = distillation_influence(objective, outputs.logits, tangent.logits, FROM_TEACHER.logits)
        assert exact.error(actual, expected) < 1e-12

    def test_its_gradient_in_the_teachers_logits(self, tangents):
        """∂I_i/∂z^t = −T p ⊙ (∂ log q − E_p ∂ log q), by hand."""
        outputs, tangent = tangents["jvp"]
        teacher = FROM_TEACHER.logits.clone().requires_grad_()
        influences = distillation_influence(KL, outputs.logits, tangent.logits, teacher)
        (actual,) = torch.autograd.grad(influences.sum(), teacher)
        p = (FROM_TEACHER.logits / 2).softmax(-1)
        centred = tangent.logits - (p * tangent.logits).sum(-1, keepdim=True)
        assert exact.error(actual, -2 * p * centred / 2) < 1e-12

    def test_a_small_step_on_one_sample_lowers_the_feedback_loss_by_its_influence(self, tangents):
        outputs, tangent = tangents["jvp"]
        influences = distillation_influence(KL, outputs.logits, tangent.logits, FROM_TEACHER.logits)
        rate = 1e-5

        def feedback(parameters):
            with torch.no_grad(), models.evaluating(STUDENT):
                return pilot.task_loss(models.apply(STUDENT, parameters, FEEDBACK), FEEDBACK).mean().item()

        for i in range(5):
            one = {name: value[i : i + 1] for name, value in FULL.items()}
            loss = as_loss(lambda student, teacher, labels: KL(student.logits, teacher.logits))
            drop = feedback(PARAMETERS) - feedback(pilot.sgd_step(STUDENT, PARAMETERS, one, loss, rate))
            assert drop == pytest.approx(rate * influences[i].item(), rel=0.05)

    def test_one_step_lowers_the_feedback_loss_by_the_sum_of_the_influences_to_first_order(self):
        """LGTM's eqs. (13)-(16): what the forecast leaves out is ½ η² ∇Lᵀ H_e ∇L, with H_e at the pilot student."""
        loss = as_loss(lambda student, teacher, labels: KL(student.logits, teacher.logits))
        slope = pilot.gradient(STUDENT, PARAMETERS, FULL, loss)

        def feedback(parameters):
            with torch.no_grad(), models.evaluating(STUDENT):
                return pilot.task_loss(models.apply(STUDENT, parameters, FEEDBACK), FEEDBACK).mean()

        for rate in (1e-6, 1e-5):
            stepped = pilot.sgd_step(STUDENT, PARAMETERS, FULL, loss, rate)
            g = feedback_gradient(STUDENT, stepped, FEEDBACK)
            outputs, tangent = student_tangent(STUDENT, PARAMETERS, BATCH, g)
            influences = distillation_influence(KL, outputs.logits, tangent.logits, FROM_TEACHER.logits)
            curved = hessian_vector_product(STUDENT, stepped, FEEDBACK, pilot.task_loss, slope)
            left_out = rate**2 / 2 * sum((slope[name] * curved[name]).sum() for name in slope).item()
            drop = (feedback(PARAMETERS) - feedback(stepped)).item()
            forecast = -meta_gradient_loss(influences, rate).item()
            assert forecast == pytest.approx(rate / 5 * influences.sum().item())
            assert drop == pytest.approx(forecast, rel=0.1)
            assert drop - forecast == pytest.approx(left_out, rel=0.01, abs=0)

    @pytest.mark.parametrize("name", ["kl_divergence", "soft_cross_entropy"])
    def test_weighting_by_the_influences_is_not_descending_them(self, tangents, name):
        """The two ends of LGTM's eq. (18), for the teacher's logits: −J M ż for eq. (9), −J ż for eq. (10)."""
        outputs, tangent = (values.logits for values in tangents["jvp"])
        objective = partial(getattr(losses, name), reduction="none")
        teacher = FROM_TEACHER.logits.clone().requires_grad_()
        influences = distillation_influence(objective, outputs, tangent, teacher)
        p, q = FROM_TEACHER.logits.softmax(-1), outputs.softmax(-1)
        jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        scores = outputs - FROM_TEACHER.logits if name == "kl_divergence" else outputs
        swapped = scores[:, :, None] * (q - p)[:, None, :]
        (weighted,) = torch.autograd.grad((influences.detach() * objective(outputs, teacher)).sum(), teacher)
        assert exact.error(weighted, -(jacobian @ swapped @ tangent[:, :, None])[..., 0]) < 1e-12
        (descended,) = torch.autograd.grad(influences.sum(), teacher)
        assert exact.error(descended, -(jacobian @ tangent[:, :, None])[..., 0]) < 1e-12
        assert exact.error(weighted, descended) > 0.1

    def test_an_objective_that_is_not_per_sample_is_refused(self, tangents):
        outputs, tangent = tangents["jvp"]
        with pytest.raises(ValueError, match=r"returned shape \(\) for 5 samples, expected \(5,\)"):
            distillation_influence(losses.kl_divergence, outputs.logits, tangent.logits, FROM_TEACHER.logits)

    def test_a_regression_head_works(self):
        z, dz = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [-1.0]])
        teacher, scores = torch.tensor([[0.0], [4.0]]), torch.tensor([0.5, 2.5])
        objective = partial(losses.distillation_loss, alpha=0.25, objective=losses.logit_mse, reduction="none")
        actual = distillation_influence(objective, z, dz, teacher, scores)
        expected = dz[:, 0] * (0.25 * 2 * (z[:, 0] - scores) + 0.75 * 2 * (z - teacher)[:, 0])
        torch.testing.assert_close(actual, expected)

    def test_nothing_of_the_students_graph_is_kept(self, tangents):
        outputs, tangent = tangents["jvp"]
        z, dz = (value.logits.clone().requires_grad_() for value in (outputs, tangent))
        assert not distillation_influence(KL, z, dz, FROM_TEACHER.logits).requires_grad


class TestInfluenceAlong:
    """The same by one call, for a loss that the batch carries everything for."""

    @pytest.mark.parametrize(
        ("method", "bound"), [("jvp", 1e-10), ("double-backward", 1e-10), ("finite-difference", 1e-6)]
    )
    def test_every_method_finds_the_inner_products(self, monkeypatch, method, bound):
        monkeypatch.setattr("kdlib.tangent.RADIUS", FINE)
        gradients = influence.per_sample_gradients(STUDENT, PARAMETERS, BATCH)
        expected = sum(gradients[key].flatten(1) @ GRADIENT[key].flatten() for key in GRADIENT)
        actual = influence_along(STUDENT, PARAMETERS, BATCH, pilot.task_loss, GRADIENT, method)
        assert exact.error(actual, expected) < bound

    @pytest.mark.parametrize(("method", "bound"), [("jvp", 1e-10), ("finite-difference", 1e-6)])
    def test_a_loss_may_look_at_hidden_states(self, monkeypatch, per_sample, method, bound):
        monkeypatch.setattr("kdlib.tangent.RADIUS", FINE)
        loss, gradients = as_loss(exact.patient), per_sample["patient"]
        expected = sum(gradients[key].flatten(1) @ GRADIENT[key].flatten() for key in GRADIENT)
        actual = influence_along(STUDENT, PARAMETERS, FULL, loss, GRADIENT, method, hidden_states=True)
        assert exact.error(actual, expected) < bound

    def test_a_finite_difference_takes_two_passes(self, monkeypatch):
        passes, apply = [], models.apply
        monkeypatch.setattr(models, "apply", lambda *a, **k: (passes.append(1), apply(*a, **k))[1])
        influence_along(STUDENT, PARAMETERS, BATCH, pilot.task_loss, GRADIENT, "finite-difference")
        assert len(passes) == 2

    @pytest.mark.parametrize("method", METHODS)
    def test_a_zero_direction_gives_zeros(self, method):
        zero = {name: torch.zeros_like(value) for name, value in PARAMETERS.items()}
        found = influence_along(STUDENT, PARAMETERS, BATCH, pilot.task_loss, zero, method)
        assert found.shape == (5,) and (found == 0).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_a_loss_that_is_not_per_sample_is_refused(self, method):
        with pytest.raises(ValueError, match=r"shape \(\) for 5 samples, expected \(5,\)"):
            influence_along(STUDENT, PARAMETERS, BATCH, lambda z, b: pilot.task_loss(z, b).mean(), GRADIENT, method)


class TestFeedbackGradientAndMetaGradient:
    def test_the_feedback_gradient_is_taken_at_the_parameters_given(self):
        """Those of the pilot student: the module's own are elsewhere."""
        loss = as_loss(lambda student, teacher, labels: KL(student.logits, teacher.logits))
        stepped = pilot.sgd_step(STUDENT, PARAMETERS, FULL, loss, LEARNING_RATE)
        moved = exact.bert()
        moved.load_state_dict(stepped, strict=False)
        moved.eval()
        pilot.task_loss(models.apply(moved, {}, FEEDBACK), FEEDBACK).mean().backward()
        expected = {name: parameter.grad for name, parameter in moved.named_parameters()}
        actual = feedback_gradient(STUDENT, stepped, FEEDBACK)
        assert exact.error(actual, expected) < 1e-13
        assert exact.error(GRADIENT, expected) > 0.01

    def test_the_feedback_gradient_may_be_a_part_and_may_come_in_pieces(self):
        some, sizes = models.last_layers(STUDENT, 1), []

        def loss(outputs, piece):
            sizes.append(len(outputs.logits))
            return pilot.task_loss(outputs, piece)

        part = feedback_gradient(STUDENT, PARAMETERS, FEEDBACK, loss, among=some, pieces=3)
        assert list(part) == some and sizes == [2, 1, 1]
        assert exact.error(part, {name: GRADIENT[name] for name in some}) < 1e-12

    def test_the_value_of_the_meta_gradient_loss_is_the_predicted_change(self):
        assert meta_gradient_loss(torch.tensor([1.0, 3.0]), 0.1).item() == pytest.approx(-0.2)

    def test_a_teachers_step_along_it_lowers_the_feedback_loss_of_the_pilot_student(self):
        logits = FROM_TEACHER.logits.clone()

        def after(logits):
            full = FULL | {"teacher_logits": logits}
            loss = as_loss(lambda student, teacher, labels: KL(student.logits, teacher.logits))
            stepped = pilot.sgd_step(STUDENT, PARAMETERS, full, loss, LEARNING_RATE)
            with torch.no_grad(), models.evaluating(STUDENT):
                return stepped, pilot.task_loss(models.apply(STUDENT, stepped, FEEDBACK), FEEDBACK).mean().item()

        stepped, before = after(logits)
        g = feedback_gradient(STUDENT, stepped, FEEDBACK)
        outputs, tangent = student_tangent(STUDENT, PARAMETERS, BATCH, g)
        variable = logits.clone().requires_grad_()
        influences = distillation_influence(KL, outputs.logits, tangent.logits, variable)
        (gradient,) = torch.autograd.grad(meta_gradient_loss(influences, LEARNING_RATE), variable)
        step = 1e-3 / gradient.norm()
        drop = before - after(logits - step * gradient)[1]
        assert drop == pytest.approx((step * gradient.square().sum()).item(), rel=1e-2)


class TestHessianVectorProduct:
    def products(self):
        return {
            method: hessian_vector_product(
                STUDENT, PARAMETERS, FEEDBACK, pilot.task_loss, exact.direction(PARAMETERS), method
            )
            for method in ("forward-over-reverse", "reverse-over-reverse")
        }

    def test_both_hessian_vector_products_agree_with_differences_of_gradients(self):
        before = frozen(STUDENT)
        with torch.no_grad():  # the caller's mode does not matter
            forward, reverse = self.products().values()
        assert not any(value.requires_grad for value in (*forward.values(), *reverse.values()))
        assert exact.error(forward, reverse) < 1e-10
        v = exact.direction(PARAMETERS)

        def gradient(step):
            return pilot.gradient(STUDENT, {k: x + step * v[k] for k, x in PARAMETERS.items()}, FEEDBACK)

        ahead, behind = gradient(1e-6), gradient(-1e-6)
        assert exact.error(forward, {name: (ahead[name] - behind[name]) / 2e-6 for name in v}) < 1e-5
        assert_untouched(STUDENT, before)

    @pytest.mark.usefixtures("unchecked")
    def test_an_unknown_way_is_refused(self):
        with pytest.raises(ValueError, match=r"'reverse-over-forward': did you mean"):
            hessian_vector_product(STUDENT, PARAMETERS, BATCH, pilot.task_loss, GRADIENT, "reverse-over-forward")
        with pytest.raises(ValueError, match="has head, which no parameter is called"):
            hessian_vector_product(STUDENT, PARAMETERS, BATCH, pilot.task_loss, GRADIENT | {"head": torch.zeros(3)})


class Inputs(nn.Module):
    """A student whose forward takes tensors by position and returns logits, as influence libraries want it."""

    def __init__(self):
        super().__init__()
        self.student = exact.bert().eval()
        self.student.set_attn_implementation("eager")

    def forward(self, input_ids, mask):
        return self.student(input_ids=input_ids, attention_mask=mask).logits


class TestOtherLibraries:
    """Distillation influence is TracIn with two losses, so that other libraries' TracIn can be asked."""

    def expected(self):
        outputs, tangent = student_tangent(STUDENT, PARAMETERS, BATCH, GRADIENT)
        return distillation_influence(KL, outputs.logits, tangent.logits, FROM_TEACHER.logits)

    def loaders(self):
        mask = {id(batch): models.additive_mask(batch["attention_mask"], torch.float64) for batch in (BATCH, FEEDBACK)}
        train = torch.utils.data.TensorDataset(BATCH["input_ids"], mask[id(BATCH)], FROM_TEACHER.logits)
        test = torch.utils.data.TensorDataset(FEEDBACK["input_ids"], mask[id(FEEDBACK)], FEEDBACK["labels"])
        return (torch.utils.data.DataLoader(data, batch_size=8) for data in (train, test))

    def test_captum(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum's own deprecations
            captum = pytest.importorskip("captum.influence", reason="captum is not installed: run make setup")
            train, test = self.loaders()
            scores = captum.TracInCP(
                Inputs(),
                train,
                ["only"],
                checkpoints_load_func=lambda module, name: 1.0,
                loss_fn=lambda logits, teacher: KL(logits, teacher),
                test_loss_fn=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
                sample_wise_grads_per_batch=False,
            ).influence(test, aggregate=True)
        assert exact.error(scores[0] / 4, self.expected()) < 1e-5

    def test_dattri(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracin = pytest.importorskip(
                "dattri.algorithm.tracin",
                reason="dattri is not among the requirements, for what it brings in; pip install dattri to run this",
            )
            task = pytest.importorskip("dattri.task")
            module = Inputs()

            def logits(parameters, sample):
                one = tuple(value[None] for value in sample[:2])
                return functional_call(module, parameters, one)

            def train_loss(parameters, sample):
                return KL(logits(parameters, sample), sample[2][None])[0]

            def test_loss(parameters, sample):
                return F.cross_entropy(logits(parameters, sample), sample[2][None])

            attribution = task.AttributionTask(
                loss_func=train_loss,
                model=module,
                checkpoints=module.state_dict(),
                target_func=test_loss,
            )
            train, test = self.loaders()
            attributor = tracin.TracInAttributor(attribution, weight_list=torch.ones(1), normalized_grad=False)
            attributor.projector_kwargs = None  # the gradients themselves: the default multiplies by a random matrix
            scores = attributor.attribute(train, test)
        assert exact.error(scores.mean(1), self.expected()) < 1e-5
