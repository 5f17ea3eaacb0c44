"""Pilot steps against torch's own optimiser on a copy; nothing of the student moves."""

import copy

import pytest
import torch

from kdlib import losses, models, pilot
from tests import exact


def frozen(module: torch.nn.Module) -> tuple:
    """All that a step could change in a module."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return state, [part.training for part in module.modules()], implementation


def assert_untouched(module: torch.nn.Module, before: tuple) -> None:
    state, modes, implementation = frozen(module)
    assert all(torch.equal(state[name], value) for name, value in before[0].items())
    assert (modes, implementation) == before[1:]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("student", "batch"), [(exact.bert(), exact.batch()), (exact.perceptron(), exact.features())], ids=["bert", "mlp"]
)
class TestSgdStep:
    def test_is_the_step_of_torchs_optimiser_without_dropout(self, student, batch):
        other = copy.deepcopy(student).eval()
        loss = pilot.task_loss(models.apply(other, {}, batch), batch).mean()
        loss.backward()
        torch.optim.SGD(other.parameters(), lr=0.3).step()
        stepped = pilot.sgd_step(student, models.trainable(student), batch, pilot.task_loss, 0.3)
        assert exact.error(stepped, models.trainable(other)) < 1e-14

    def test_leaves_the_module_its_buffers_and_the_parameters_alone(self, student, batch):
        student.train()
        before, parameters = frozen(student), dict(student.named_parameters())
        copies = {name: value.detach().clone() for name, value in parameters.items()}
        stepped = pilot.sgd_step(student, parameters, batch, pilot.task_loss, 0.3)
        assert_untouched(student, before)
        assert all(torch.equal(parameters[name], value) for name, value in copies.items())
        assert not any(value.requires_grad for value in stepped.values())

    def test_a_second_step_starts_where_the_first_ended(self, student, batch):
        one = pilot.sgd_step(student, models.trainable(student), batch, pilot.task_loss, 0.3)
        two = pilot.sgd_step(student, one, batch, pilot.task_loss, 0.3)
        moved = copy.deepcopy(student)
        moved.load_state_dict(one, strict=False)
        expected = pilot.sgd_step(moved, models.trainable(moved), batch, pilot.task_loss, 0.3)
        assert exact.error(two, expected) < 1e-14
        assert exact.error(two, one) > 1e-4


def test_the_module_is_restored_after_an_error():
    student, batch = exact.bert(), exact.batch()
    student.bert.eval()  # a part in another mode than the whole
    before = frozen(student)
    with pytest.raises(ValueError, match="label 7"):
        pilot.gradient(student, models.trainable(student), batch | {"labels": torch.full((5,), 7)})
    assert_untouched(student, before)


def test_with_a_graph_the_step_can_be_differentiated_in_the_teacher():
    student, batch = exact.perceptron(), exact.features()
    logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)

    def loss(outputs, batch):
        return losses.kl_divergence(outputs.logits, logits, reduction="none")

    parameters = models.trainable(student)
    with torch.no_grad():  # the caller's mode does not matter
        stepped = pilot.sgd_step(student, parameters, batch, loss, 0.3, create_graph=True)
        without = pilot.sgd_step(student, parameters, batch, loss, 0.3)
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in stepped.values()), logits)
    assert gradient.abs().sum() > 0
    assert not any(value.requires_grad for value in without.values())
    assert exact.error(stepped, without) < 1e-14


def test_only_the_parameters_given_move():
    student, batch = exact.bert(), exact.batch()
    student.bert.requires_grad_(False)
    parameters = models.trainable(student)
    assert sorted(parameters) == ["classifier.bias", "classifier.weight"]
    assert pilot.sgd_step(student, parameters, batch, pilot.task_loss, 0.3).keys() == parameters.keys()


def test_a_parameter_without_a_part_has_a_zero_gradient():
    student = exact.perceptron()
    student.idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    gradient = pilot.gradient(student, models.trainable(student), exact.features())
    assert torch.equal(gradient["idle"], torch.zeros(2, dtype=torch.float64))
    assert gradient["last.weight"].abs().sum() > 0


def test_hidden_states_are_there_when_asked_for():
    student, batch = exact.bert(), exact.batch()

    def loss(outputs, batch):
        return outputs.hidden_states[-1].square().mean((1, 2))

    gradient = pilot.gradient(student, models.trainable(student), batch, loss, hidden_states=True)
    assert gradient["classifier.weight"].abs().sum() == 0
    assert gradient["bert.encoder.layer.0.output.dense.weight"].abs().sum() > 0


@pytest.mark.parametrize("learning_rate", [-0.1, float("nan"), float("inf")])
def test_a_wrong_learning_rate_is_refused(learning_rate):
    with pytest.raises(ValueError, match=f"learning_rate is {learning_rate}"):
        pilot.sgd({"a": torch.ones(2)}, {"a": torch.ones(2)}, learning_rate)
