"""The classical tools, each against a way that shares no step with the one tested."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from kdlib import influence, losses, models, pilot
from kdlib.tangent import feedback_gradient, hessian_vector_product
from tests import exact
from tests.test_tangent import BATCH, FEEDBACK, FULL, GRADIENT, KL, METHODS, PARAMETERS, STUDENT, as_loss


class TestPerSampleGradients:
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_vmap_agrees_with_the_loop(self, chunk_size):
        of_all = partial(influence.per_sample_gradients, STUDENT, PARAMETERS, FULL, as_loss(exact.patient))
        actual = of_all("vmap", chunk_size, hidden_states=True)
        assert exact.error(actual, of_all("loop", hidden_states=True)) < 1e-12
        assert actual["classifier.weight"].shape == (5, 3, exact.HIDDEN)

    @pytest.mark.parametrize(("chunk_size", "calls"), [(None, 2), (2, 4)])
    def test_a_chunk_is_as_large_as_it_is_told_to_be(self, monkeypatch, chunk_size, calls):
        """One pass for the outputs, then one for each chunk of the five samples."""
        passes, apply = [], models.apply
        monkeypatch.setattr(models, "apply", lambda *a, **k: (passes.append(1), apply(*a, **k))[1])
        influence.per_sample_gradients(STUDENT, PARAMETERS, BATCH, method="vmap", chunk_size=chunk_size)
        assert len(passes) == calls

    def test_their_mean_is_the_gradient_of_the_mean(self):
        gradients = influence.per_sample_gradients(STUDENT, PARAMETERS, FEEDBACK)
        assert exact.error({name: value.mean(0) for name, value in gradients.items()}, GRADIENT) < 1e-12

    @pytest.mark.usefixtures("unchecked")
    def test_an_unknown_method_is_refused(self):
        with pytest.raises(ValueError, match="method is 'vmaps'; expected 'loop' or 'vmap'"):
            influence.per_sample_gradients(STUDENT, PARAMETERS, BATCH, method="vmaps")


DECAY = 0.1
POINTS = exact.features(30, seed=3)
DATA = {"input": POINTS["features"], "labels": POINTS["labels"]}  # as nn.Linear names its argument
EQUAL = torch.ones(30, dtype=torch.float64)
LINEAR = nn.Linear(4, exact.CLASSES).double()


def newton(weights, start, steps=2):
    """The minimum of Σ_i weights_i ℓ_i / 30 + λ/2 ‖θ‖² for a linear classifier, as a flat vector."""

    def total(vector):
        logits = functional_call(LINEAR, influence.from_vector(vector, models.trainable(LINEAR)), (DATA["input"],))
        hard = F.cross_entropy(logits, DATA["labels"], reduction="none")
        return (weights * hard).sum() / 30 + DECAY / 2 * vector.square().sum()

    for _ in range(steps):
        start = start - torch.linalg.solve(hessian(total)(start), torch.func.grad(total)(start))
    return start, hessian(total)(start)


@pytest.fixture(scope="module")
def regression():
    """The optimum of a regularised logistic regression, by name, and the Hessian there."""
    vector, curvature = newton(EQUAL, torch.zeros(15, dtype=torch.float64), steps=8)
    return influence.from_vector(vector, models.trainable(LINEAR)), curvature


def positive(size: int, seed: int) -> torch.Tensor:
    root = exact.direction({"a": torch.zeros(size, size).double()}, seed + 100)["a"]
    return root @ root.T / size


class TestClassicalTools:
    def test_the_hessian_of_a_logistic_regression(self, regression):
        here, curvature = regression
        v = exact.direction(here)
        product = hessian_vector_product(LINEAR, here, DATA, pilot.task_loss, v)
        expected = curvature @ influence.to_vector(v) - DECAY * influence.to_vector(v)
        assert exact.error(influence.to_vector(product), expected) < 1e-10

    def test_conjugate_gradient_and_lissa_solve(self):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        matrix, like = root @ root.T / 6, {"a": torch.zeros(2, 2).double(), "b": torch.zeros(2).double()}
        right = exact.direction(like)
        expected = torch.linalg.solve(matrix + 0.5 * torch.eye(6), influence.to_vector(right))

        def product(vector):
            return influence.from_vector(matrix @ influence.to_vector(vector), like)

        direct = influence.conjugate_gradient(product, right, 0.5, tolerance=1e-12)
        assert exact.error(influence.to_vector(direct.vector), expected) < 1e-10
        assert direct.iterations <= 7 and direct.residual < 1e-12
        cut = influence.conjugate_gradient(product, right, 0.5, iterations=2)
        assert cut.iterations == 2 and 1e-6 < cut.residual < 1
        slow = influence.lissa([product] * 300, right, 0.5, scale=4.0)
        assert exact.error(influence.to_vector(slow.vector), expected) < 1e-8
        assert slow.iterations == 300 and slow.residual < 1e-8

    @given(st.integers(1, 6), st.integers(0, 7), st.sampled_from([1e-8, 1.0, 1e8]), st.integers(0, 99))
    def test_what_conjugate_gradients_report_is_the_relative_residual_of_what_they_return(self, size, cut, scale, seed):
        """‖v − (H + λ)x‖/‖v‖ from the matrix itself, whatever the length of v, after any number of products."""
        matrix, right = positive(size, seed), scale * exact.direction({"a": torch.zeros(size).double()}, seed)["a"]
        calls = []

        def product(vector):
            calls.append(1)
            return {"a": matrix @ vector["a"]}

        found = influence.conjugate_gradient(product, {"a": right}, 0.3, cut, tolerance=1e-9)
        left = right - matrix @ found.vector["a"] - 0.3 * found.vector["a"]
        assert found.residual == pytest.approx((left.norm() / right.norm()).item(), rel=1e-3, abs=1e-12)
        assert found.iterations == len(calls) <= cut
        assert found.iterations == cut or found.residual <= 1e-9 < 1e-8  # it stops at the bound, or at the number
        longer = influence.conjugate_gradient(product, {"a": right}, 0.3, size + 2, tolerance=1e-9)
        assert longer.residual <= 1e-9 and longer.iterations <= size + 1

    @given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1e-8, 1.0, 1e8]), st.integers(0, 99))
    def test_what_lissa_reports_is_the_relative_residual_before_its_last_step(self, size, steps, scale, seed):
        matrix, right = positive(size, seed), scale * exact.direction({"a": torch.zeros(size).double()}, seed)["a"]
        product = lambda vector: {"a": matrix @ vector["a"]}  # noqa: E731
        sigma = torch.linalg.eigvalsh(matrix).max().item() + 0.3
        found, before = (influence.lissa([product] * k, {"a": right}, 0.3, sigma) for k in (steps, steps - 1))
        left = right - matrix @ before.vector["a"] - 0.3 * before.vector["a"]
        assert found.residual == pytest.approx((left.norm() / right.norm()).item(), rel=1e-9)
        torch.testing.assert_close(found.vector["a"], before.vector["a"] + left / sigma, rtol=1e-9, atol=0)
        if steps <= 2:  # before the first step, and at it, the solution is zero
            assert before.residual == pytest.approx(1.0)

    def test_solvers_take_a_zero(self):
        zero = {"a": torch.zeros(3)}
        for solution in (influence.conjugate_gradient(dict, zero), influence.lissa([dict] * 2, zero)):
            assert torch.equal(solution.vector["a"], torch.zeros(3)) and solution.residual == 0

    def test_an_indefinite_matrix_and_a_small_scale_are_refused(self):
        right = {"a": torch.ones(3)}
        with pytest.raises(ValueError, match=r"curvature along a search direction is -0\.5 .* raise the damping"):
            influence.conjugate_gradient(lambda v: {"a": -v["a"]}, right, damping=0.5)
        with pytest.raises(ValueError, match="curvature along a search direction is 0 after 0 products"):
            influence.conjugate_gradient(lambda v: {"a": 0 * v["a"]}, right)
        with pytest.raises(ValueError, match=r"diverges.*scale 1\.0"):
            influence.lissa([lambda v: {"a": 5 * v["a"]}] * 100, right)

    def test_classical_influence_predicts_training_again_with_other_weights(self, regression):
        """The derivative in the weight of each sample, by training to the end with a little more and a little less."""
        here, _ = regression
        points = exact.features(10, seed=4)
        feedback = {"input": points["features"], "labels": points["labels"]}
        start = influence.to_vector(here)

        def after(i, change):
            weights = EQUAL.clone()
            weights[i] += change
            parameters = influence.from_vector(newton(weights, start)[0], here)
            return pilot.task_loss(models.apply(LINEAR, parameters, feedback), feedback).mean().detach()

        expected = torch.stack([(after(i, 1e-3) - after(i, -1e-3)) / 2e-3 for i in range(30)])
        g = feedback_gradient(LINEAR, here, feedback)
        product = partial(hessian_vector_product, LINEAR, here, DATA, pilot.task_loss)
        inverse = influence.conjugate_gradient(product, g, damping=DECAY, tolerance=1e-12).vector
        found = [influence.classical_influence(LINEAR, here, DATA, pilot.task_loss, inverse, way) for way in METHODS]
        assert all(exact.error(actual / 30, expected) < 1e-5 for actual in found)
        assert exact.error(found[1], found[0]) > 1e-12  # a difference is none of the exact ways

    def test_tracin_sums_over_checkpoints(self):
        other = {name: value + 0.01 for name, value in PARAMETERS.items()}
        checkpoints = [influence.Checkpoint(PARAMETERS, 0.5), influence.Checkpoint(other, 0.25)]
        actual = influence.tracin(STUDENT, checkpoints, BATCH, FEEDBACK)
        expected = torch.zeros(5, dtype=torch.float64)
        for checkpoint in checkpoints:
            samples = influence.per_sample_gradients(STUDENT, checkpoint.parameters, BATCH)
            g = pilot.gradient(STUDENT, checkpoint.parameters, FEEDBACK)
            expected += checkpoint.learning_rate * sum(samples[k].flatten(1) @ g[k].flatten() for k in g)
        assert exact.error(actual, expected) < 1e-10
        near = influence.tracin(STUDENT, checkpoints, BATCH, FEEDBACK, method="finite-difference")
        assert 1e-9 < exact.error(near, expected) < 1e-2
        with pytest.raises(ValueError, match="there is none"):
            influence.tracin(STUDENT, [], BATCH, FEEDBACK)

    def test_tracin_takes_one_loss_for_the_batch_and_another_for_the_feedback(self):
        loss = as_loss(lambda student, teacher, labels: KL(student.logits, teacher.logits))
        soft = lambda outputs, batch: losses.soft_cross_entropy(  # noqa: E731
            outputs.logits, torch.ones_like(outputs.logits), reduction="none"
        )
        actual = influence.tracin(STUDENT, [influence.Checkpoint(PARAMETERS, 0.5)], FULL, FEEDBACK, loss, soft)
        samples = influence.per_sample_gradients(STUDENT, PARAMETERS, FULL, loss)
        g = pilot.gradient(STUDENT, PARAMETERS, FEEDBACK, soft)
        assert exact.error(actual, 0.5 * sum(samples[k].flatten(1) @ g[k].flatten() for k in g)) < 1e-10
