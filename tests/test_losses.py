"""Each objective against an independent statement: torch.distributions, autograd, scikit-learn, closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.metrics import log_loss
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from kdlib import losses


def logits(seed: int, batch: int = 5, classes: int = 3) -> torch.Tensor:
    return 2 * torch.randn(batch, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


pairs = st.tuples(
    arrays(np.float64, (4, 3), elements=st.floats(-6, 6)),
    arrays(np.float64, (4, 3), elements=st.floats(-6, 6)),
    st.floats(0.5, 20),
)


def test_cross_entropy_is_sklearns_log_loss():
    z, labels = logits(0), torch.tensor([0, 2, 1, 1, 0])
    expected = log_loss(labels.numpy(), z.softmax(-1).numpy(), labels=[0, 1, 2])
    assert losses.cross_entropy(z, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_temperature_squared_times_the_divergence_of_torch_distributions(direction, temperature):
    student, teacher = logits(1), logits(2)
    p, q = Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    expected = temperature**2 * (torch_kl(p, q) if direction == "forward" else torch_kl(q, p))
    actual = losses.kl_divergence(student, teacher, temperature, direction, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_reverse_kl_is_the_other_direction():
    student, teacher = logits(3), logits(4)
    torch.testing.assert_close(
        losses.reverse_kl_divergence(student, teacher, 2.0), losses.kl_divergence(teacher, student, 2.0)
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 5.0])
@pytest.mark.parametrize("objective", [losses.kl_divergence, losses.soft_cross_entropy])
def test_the_gradient_in_the_students_logits(objective, temperature):
    student, teacher = logits(5).requires_grad_(), logits(6)
    objective(student, teacher, temperature=temperature, reduction="sum").backward()
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-14)


def test_soft_cross_entropy_exceeds_kl_by_the_teachers_entropy():
    student, teacher, temperature = logits(7), logits(8), 3.0
    entropy = Categorical(logits=teacher / temperature).entropy()
    difference = losses.soft_cross_entropy(student, teacher, temperature, "none") - losses.kl_divergence(
        student, teacher, temperature, reduction="none"
    )
    torch.testing.assert_close(difference, temperature**2 * entropy)


def test_high_temperature_limit_is_half_the_squared_error_of_centred_logits():
    student, teacher = logits(9), logits(10)
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    limit = (centred**2).mean(-1) / 2
    actual = losses.kl_divergence(student, teacher, 1e4, reduction="none")
    torch.testing.assert_close(actual, limit, rtol=1e-3, atol=0)


def test_logit_mse_and_probability_mse_by_hand():
    student, teacher = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 2.0]])
    assert losses.logit_mse(student, teacher).item() == pytest.approx((1 + 9) / 2)
    p_s, p_t = 1 / (1 + math.exp(-2 / 3)), 1 / (1 + math.exp(2 / 3))
    assert losses.probability_mse(student, teacher, 3.0).item() == pytest.approx(9 * (p_s - p_t) ** 2, rel=1e-6)


def test_squared_error_takes_one_output_per_sample():
    """In the precision of the network, whatever that of the scores: a data set's are in float64."""
    prediction, target = torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 5.0])
    for scores in (target, target.double()):
        torch.testing.assert_close(losses.squared_error(prediction, scores, "none"), torch.tensor([1.0, 4.0]))


def test_task_loss_follows_the_type_of_the_labels():
    z = logits(11)
    labels = torch.tensor([0, 1, 2, 0, 1])
    log_p, errors = torch.log(softmax(z)), z[:, 0] - labels
    for outputs, targets, values in (
        (z, labels, -log_p[torch.arange(5), labels]),
        (z[:, :1], labels.double(), errors.square()),
    ):
        torch.testing.assert_close(losses.task_loss(outputs, targets, "none"), values)
        torch.testing.assert_close(losses.task_loss(outputs, targets, "sum"), values.sum())
        torch.testing.assert_close(losses.task_loss(outputs, targets), values.mean())


def written_out(name: str, student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    """What an objective's name promises, from the two distributions."""
    p, q = Categorical(logits=teacher / t), Categorical(logits=student / t)
    return {
        "kl": lambda: t**2 * torch_kl(p, q),
        "reverse_kl": lambda: t**2 * torch_kl(q, p),
        "soft_cross_entropy": lambda: t**2 * (torch_kl(p, q) + p.entropy()),
        "reverse_soft_cross_entropy": lambda: t**2 * (torch_kl(q, p) + q.entropy()),
        "logit_mse": lambda: (student - teacher).square().sum(1) / student.shape[1],
        "probability_mse": lambda: t**2 * (q.probs - p.probs).square().sum(1) / student.shape[1],
    }[name]()


@given(pairs)
def test_every_name_is_that_of_its_objective(pair):
    student, teacher, temperature = torch.tensor(pair[0]), torch.tensor(pair[1]), pair[2]
    for name, objective in losses.TEACHER_OBJECTIVES.items():
        if name not in ("dist", "spherical"):  # they have tests of their own
            values = objective(student, teacher, temperature=temperature, reduction="none")
            torch.testing.assert_close(values, written_out(name, student, teacher, temperature), rtol=1e-7, atol=1e-9)
    assert losses.TEACHER_OBJECTIVES["dist"] is losses.dist and "reverse_soft_cross_entropy" not in losses.OBJECTIVES


@pytest.mark.parametrize("name", losses.TEACHER_OBJECTIVES)
def test_the_objectives_that_need_the_whole_batch_are_those_whose_samples_do_not_stand_alone(name):
    student, teacher = logits(50), logits(51)
    objective = partial(losses.TEACHER_OBJECTIVES[name], temperature=2.0, reduction="none")
    pieces = torch.cat([objective(student[part], teacher[part]) for part in (slice(0, 2), slice(2, 5))])
    assert torch.allclose(pieces, objective(student, teacher)) == (name not in losses.BATCH_OBJECTIVES)


@pytest.mark.parametrize("objective", losses.OBJECTIVES.values(), ids=losses.OBJECTIVES)
class TestEveryObjective:
    @given(pairs)
    def test_is_smallest_at_the_teacher_and_zero_there_but_for_the_entropy(self, objective, pair):
        student, teacher, temperature = torch.tensor(pair[0]), torch.tensor(pair[1]), pair[2]
        at_teacher = objective(teacher, teacher, temperature=temperature, reduction="none")
        elsewhere = objective(student, teacher, temperature=temperature, reduction="none")
        assert (elsewhere >= at_teacher - 1e-9).all()
        if objective is not losses.soft_cross_entropy:
            torch.testing.assert_close(at_teacher, torch.zeros_like(at_teacher), rtol=0, atol=1e-9)

    @given(pairs, st.floats(-50, 50))
    def test_adding_a_constant_to_the_logits_changes_nothing(self, objective, pair, constant):
        student, teacher, temperature = torch.tensor(pair[0]), torch.tensor(pair[1]), pair[2]
        before = objective(student, teacher, temperature=temperature, reduction="none")
        shift = constant if objective is not losses.logit_mse else 0.0
        after = objective(student + shift, teacher - shift, temperature=temperature, reduction="none")
        torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-8)

    @given(pairs, st.permutations(range(4)))
    def test_is_per_sample(self, objective, pair, order):
        student, teacher, temperature = torch.tensor(pair[0]), torch.tensor(pair[1]), pair[2]
        values = objective(student, teacher, temperature=temperature, reduction="none")
        permuted = objective(student[order], teacher[order], temperature=temperature, reduction="none")
        assert values.shape == (4,)
        torch.testing.assert_close(permuted, values[order])

    def test_reductions_agree(self, objective):
        student, teacher = logits(12), logits(13)
        values = objective(student, teacher, temperature=2.0, reduction="none")
        torch.testing.assert_close(objective(student, teacher, temperature=2.0, reduction="sum"), values.sum())
        torch.testing.assert_close(objective(student, teacher, temperature=2.0, reduction="mean"), values.mean())
        torch.testing.assert_close(objective(student, teacher, temperature=2.0), values.mean())

    def test_keeps_the_teachers_gradient(self, objective):
        student, teacher = logits(14), logits(15).requires_grad_()
        objective(student, teacher, temperature=2.0).backward()
        assert teacher.grad.abs().sum() > 0

    def test_gradient_hardly_depends_on_a_high_temperature(self, objective):
        """The reason for T²: without it the ratio would be 1/4."""
        sizes = []
        for temperature in (50.0, 100.0):
            student = logits(16).requires_grad_()
            objective(student, logits(17), temperature=temperature).backward()
            sizes.append(student.grad.norm().item())
        assert sizes[1] / sizes[0] == pytest.approx(1.0, rel=0.05)

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_bad_input_by_name(self, objective):
        with pytest.raises(ValueError, match=r"\(5, 3\).*\(5, 2\)"):
            objective(logits(0), logits(0, classes=2))
        for temperature in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="temperature"):
                objective(logits(0), logits(1), temperature=temperature)
        with pytest.raises(ValueError, match="reduction is 'average'"):
            objective(logits(0), logits(1), reduction="average")
        with pytest.raises(ValueError, match="empty batch"):
            objective(logits(0)[:0], logits(1)[:0])


class TestDist:
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_is_one_minus_the_mean_correlations_of_rows_and_of_columns(self, temperature):
        """SciPy's Pearson correlation, row by row and column by column."""
        student, teacher = logits(30), logits(31)
        p, q = (softmax(z / temperature).numpy() for z in (student, teacher))
        rows = [stats.pearsonr(p[i], q[i]).statistic for i in range(len(p))]
        columns = [stats.pearsonr(p[:, c], q[:, c]).statistic for c in range(p.shape[1])]
        expected = 2.0 * (1 - sum(rows) / len(rows)) + 0.5 * (1 - sum(columns) / len(columns))
        actual = losses.dist(student, teacher, temperature, inter=2.0, intra=0.5)
        assert actual.item() == pytest.approx(expected, rel=1e-6)

    @given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 99))
    def test_the_distance_does_not_see_a_scale_and_a_shift(self, scale, shift, seed):
        a, b = logits(seed), logits(seed + 100)
        for dim in (0, 1):
            distance = losses.correlation_distance(a, b, dim)
            other = losses.correlation_distance(scale * a + shift, b, dim)
            torch.testing.assert_close(other, distance, rtol=1e-4, atol=1e-6)
            assert (distance >= 0).all() and (distance.sum(dim) <= 2 + 1e-9).all()

    def test_two_probabilities_have_a_correlation_without_a_gradient(self):
        """±1, whatever they are: the inter part says nothing where there are two classes, and is left out."""
        student, teacher = logits(32, classes=2).requires_grad_(), logits(33, classes=2)
        p, q = student.softmax(-1), teacher.softmax(-1)
        inter = losses.correlation_distance(p, q, dim=1).sum(1)
        same = (student[:, 0] > student[:, 1]) == (teacher[:, 0] > teacher[:, 1])
        torch.testing.assert_close(inter, 2 - 2 * same.double(), rtol=0, atol=1e-3)
        assert torch.autograd.grad(inter.sum(), student)[0].abs().max() < 1e-3
        intra = losses.dist(student, teacher)
        assert torch.autograd.grad(intra, student)[0].abs().max() > 1e-2
        assert losses.dist(student, teacher, inter=5.0) == intra
        three = logits(34).requires_grad_()
        distance = losses.correlation_distance(three.softmax(-1), logits(35).softmax(-1), dim=1)
        assert torch.autograd.grad(distance.sum(), three)[0].abs().max() > 1e-2

    def test_a_sample_does_not_stand_alone(self):
        """Its value in the batch is not that of a batch of its own; the others' values depend on it."""
        student, teacher = logits(36), logits(37)
        other = student.clone()
        other[0] = -other[0]
        before, after = (losses.dist(z, teacher, reduction="none") for z in (student, other))
        assert (before[1:] != after[1:]).all()

    def test_equal_probabilities_have_no_correlation_and_finite_gradients(self):
        """As after `zero_classifier`: without the small number under the root the gradient would be NaN."""
        student = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        for teacher in (logits(38, batch=4), torch.zeros(4, 3, dtype=torch.float64)):
            (gradient,) = torch.autograd.grad(losses.dist(student, teacher), student)
            assert gradient.isfinite().all()


def test_objectives_with_a_softmax_refuse_a_single_output():
    one = torch.zeros(2, 1)
    for name, objective in losses.OBJECTIVES.items():
        if name in losses.REGRESSION_OBJECTIVES:
            assert objective(one, one + 1).item() == 1.0
        else:
            with pytest.raises(ValueError, match="logit_mse"):
                objective(one, one)


@pytest.mark.usefixtures("unchecked")
def test_directions_differ_and_a_third_is_refused():
    student, teacher = logits(18), logits(19)
    assert losses.kl_divergence(student, teacher) != losses.kl_divergence(student, teacher, direction="reverse")
    with pytest.raises(ValueError, match="sideways"):
        losses.kl_divergence(student, teacher, direction="sideways")


@pytest.mark.usefixtures("unchecked")
def test_labels_out_of_range_and_wrong_heads_are_named():
    with pytest.raises(ValueError, match="label 3 is outside 0 … 2"):
        losses.cross_entropy(logits(0), torch.tensor([0, 1, 3, 0, 1]))
    with pytest.raises(ValueError, match="label -1"):
        losses.cross_entropy(logits(0), torch.tensor([0, 1, -1, 0, 1]))
    with pytest.raises(ValueError, match=r"\(5, 1\), got \(5, 3\)"):
        losses.task_loss(logits(0), torch.rand(5))


def test_large_logits_stay_finite():
    student, teacher = torch.tensor([[800.0, -800.0, 0.0]]).requires_grad_(), torch.tensor([[-800.0, 800.0, 0.0]])
    for objective in losses.OBJECTIVES.values():
        value = objective(student, teacher, temperature=1.0)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all()


def test_curvature_of_kl_is_the_softmax_covariance():
    """The Hessian in the student's logits is diag(q) − q qᵀ: an independent check through second derivatives."""
    student, teacher = logits(20, batch=1)[0], logits(21, batch=1)[0]
    actual = torch.autograd.functional.hessian(lambda z: losses.kl_divergence(z[None], teacher[None]), student)
    q = student.softmax(-1)
    torch.testing.assert_close(actual, torch.diag(q) - torch.outer(q, q))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_reverse_soft_cross_entropy_is_the_teachers_cross_entropy_under_the_student(temperature):
    """−T² Σ p_s log p_t, as LGTM eq. (3) prints it; linear in p_s, so that it has no minimum inside the simplex."""
    student, teacher = logits(0), logits(1)
    p_s, p_t = (softmax(z / temperature) for z in (student, teacher))
    expected = torch.zeros(5, dtype=torch.float64)
    for c in range(3):
        expected -= temperature**2 * p_s[:, c] * p_t[:, c].log()
    actual = losses.reverse_soft_cross_entropy(student, teacher, temperature, "none")
    torch.testing.assert_close(actual, expected)
    other = logits(2)
    mixed = temperature * (0.3 * p_s + 0.7 * softmax(other / temperature)).log()
    parts = [losses.reverse_soft_cross_entropy(z, teacher, temperature, "none") for z in (student, other, mixed)]
    torch.testing.assert_close(parts[2], 0.3 * parts[0] + 0.7 * parts[1])
    certain = torch.nn.functional.one_hot(teacher.argmax(-1), 3) * 1e4
    best = losses.reverse_soft_cross_entropy(certain, teacher, 1.0, "none")
    assert (best < losses.reverse_soft_cross_entropy(teacher, teacher, 1.0, "none")).all()


def softmax(values: torch.Tensor) -> torch.Tensor:
    return values.exp() / values.exp().sum(-1, keepdim=True)
