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


def test_the_gradient_among_some_parameters_is_a_part_of_the_whole_and_ends_its_backward_pass_there():
    student, batch = exact.bert(), exact.batch()
    parameters = pilot.sgd_step(student, models.trainable(student), batch, pilot.task_loss, 0.3)  # not the module's own
    whole = pilot.gradient(student, parameters, batch)
    some = models.last_layers(student, 1)
    part = pilot.gradient(student, parameters, batch, among=some)
    assert list(part) == some and 0 < len(some) < len(whole)
    assert all(torch.equal(part[name], whole[name]) for name in some)
    graphs = []
    student.bert.embeddings.register_forward_hook(lambda module, _, output: graphs.append(output.requires_grad))
    pilot.gradient(student, parameters, batch)
    pilot.gradient(student, parameters, batch, among=some)
    assert graphs == [True, False]


@pytest.mark.parametrize("pieces", [2, 3, 5, 7])
@pytest.mark.parametrize("among", [None, 1])
def test_the_gradient_in_pieces_is_that_of_the_whole_batch(pieces, among):
    """Five samples: neither two nor three pieces are equal in size, and nobody can make seven."""
    student, batch = exact.bert(), exact.batch()
    parameters, sizes = models.trainable(student), []
    names = None if among is None else models.last_layers(student, among)

    def loss(outputs, piece):
        sizes.append(len(outputs.logits))
        return pilot.task_loss(outputs, piece)

    whole = pilot.gradient(student, parameters, batch, among=names)
    assert exact.error(pilot.gradient(student, parameters, batch, loss, among=names, pieces=pieces), whole) < 1e-12
    assert len(sizes) == min(pieces, 5) and sum(sizes) == 5
    parts = [pilot.gradient(student, parameters, piece, among=names) for piece, _ in pilot.cut(batch, pieces)]
    unweighted = {name: sum(part[name] for part in parts) / len(parts) for name in whole}
    assert (exact.error(unweighted, whole) > 1e-3) == (pieces < 5)


def test_pieces_can_be_differentiated_and_one_piece_is_the_whole_batch_bit_for_bit():
    student, batch = exact.bert(), exact.batch()
    ends = []
    for pieces in (1, 2):
        logits = torch.zeros(5, exact.CLASSES, dtype=torch.float64, requires_grad=True)

        def loss(outputs, piece, logits=logits):
            return losses.kl_divergence(outputs.logits, logits[piece["places"]], reduction="none")

        placed = batch | {"places": torch.arange(5)}
        slopes = pilot.gradient(student, models.trainable(student), placed, loss, create_graph=True, pieces=pieces)
        size = sum(value.square().sum() for value in slopes.values())
        ends.append(torch.autograd.grad(size, logits)[0])
    assert exact.error(*ends) < 1e-9 and ends[0].norm() > 0
    assert pilot.cut(batch, 1)[0][0]["input_ids"] is batch["input_ids"]
    with pytest.raises(ValueError, match="pieces is 0; expected 1"):
        pilot.gradient(student, models.trainable(student), batch, pieces=0)


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


@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_what_is_inside_is_there_when_asked_for(what):
    student, batch = exact.bert(), exact.batch()
    parameters = models.trainable(student)

    def loss(outputs, batch):
        return getattr(outputs, what)[-1].square().flatten(1).mean(1)

    gradient = pilot.gradient(student, parameters, batch, loss, **{what: True})
    assert gradient["classifier.weight"].abs().sum() == 0
    assert gradient["bert.encoder.layer.0.output.dense.weight"].abs().sum() > 0
    stepped = pilot.sgd_step(student, parameters, batch, loss, 0.3, **{what: True})
    assert exact.error(stepped, {name: value - 0.3 * gradient[name] for name, value in parameters.items()}) < 1e-14


@pytest.mark.parametrize(
    ("options", "fast"), [({}, True), ({"create_graph": True}, False), ({"attentions": True}, False)], ids=str
)
def test_only_second_derivatives_and_those_who_look_at_the_attention_take_the_slow_one(options, fast):
    student, seen = exact.bert(), []
    student.register_forward_hook(lambda module, *_: seen.append(module.config._attn_implementation))
    pilot.gradient(student, models.trainable(student), exact.batch(), **options)
    assert [name == "sdpa" for name in seen] == [fast]


def test_parameters_with_a_past_are_constants_and_stay_as_they_were_given():
    """Those of a step that can be differentiated: its graph ends here, and no tensor of the caller is marked."""
    student, batch = exact.perceptron(), exact.features()
    logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    loss = lambda outputs, _: losses.kl_divergence(outputs.logits, logits, reduction="none")  # noqa: E731
    past = pilot.sgd_step(student, models.trainable(student), batch, loss, 0.3, create_graph=True)
    plain = {name: value.detach().clone() for name, value in past.items()}
    ends = [pilot.gradient(student, given, batch, create_graph=True) for given in (past, plain)]
    assert exact.error(*ends) < 1e-14
    assert not any(value.requires_grad for value in plain.values())
    total = sum(value.sum() for value in ends[0].values())
    assert torch.autograd.grad(total, logits, allow_unused=True)[0] is None


@pytest.mark.parametrize("learning_rate", [-0.1, float("nan"), float("inf")])
def test_a_wrong_learning_rate_is_refused(learning_rate):
    with pytest.raises(ValueError, match=f"learning_rate is {learning_rate}"):
        pilot.sgd({"a": torch.ones(2)}, {"a": torch.ones(2)}, learning_rate)


def trained(steps: int, fused: bool = False, student=None):
    """A network, a batch and its AdamW, with two weight decays, after some real steps on other batches."""
    student = exact.perceptron() if student is None else student
    matrices, vectors = (
        [p for p in student.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-4, fused=fused)
    data = exact.batch if hasattr(student, "bert") else exact.features
    for step in range(steps):
        for name, value in pilot.gradient(student, models.trainable(student), data(5, step + 1)).items():
            student.get_parameter(name).grad = value
        optimizer.step()
    optimizer.zero_grad()
    return student, data(5, 0), optimizer


class TestAdamW:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("steps", [0, 1, 5])
    @pytest.mark.parametrize("learning_rate", [None, 0.5])
    def test_is_the_next_step_of_torchs_optimiser(self, steps, fused, learning_rate):
        """Catches a dropped bias correction, and a weight decay that is dropped, coupled or not per group."""
        student, batch, optimizer = trained(steps, fused)
        known = copy.deepcopy(optimizer.state_dict())
        parameters = models.trainable(student)
        gradient = pilot.gradient(student, parameters, batch)
        state = pilot.adamw_state(optimizer, dict(student.named_parameters()), learning_rate)
        stepped = pilot.adamw(parameters, gradient, state)
        now = optimizer.state_dict()
        assert now["param_groups"] == known["param_groups"] and now["state"].keys() == known["state"].keys()
        for number, moments in known["state"].items():
            assert all(torch.equal(now["state"][number][kind], value) for kind, value in moments.items())

        other, own = copy.deepcopy((student, optimizer))
        for name, parameter in other.named_parameters():
            parameter.grad = gradient[name]
        for group in own.param_groups:
            group["lr"] = 0.02 if learning_rate is None else learning_rate
        own.step()
        assert exact.error(stepped, models.trainable(other)) < 1e-14
        assert exact.error(stepped, parameters) > 1e-3

    def test_a_weight_that_never_learned_does_not_set_the_count_of_steps(self):
        """torch keeps no state for it; the others go on counting."""
        student, batch, optimizer = trained(3)
        student.idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer.add_param_group({"params": [student.idle], "weight_decay": 0.0})
        parameters = models.trainable(student)
        gradient = pilot.gradient(student, parameters, batch)
        state = pilot.adamw_state(optimizer, dict(student.named_parameters()))
        assert state.step == 3
        stepped = pilot.adamw(parameters, gradient, state)
        other, own = copy.deepcopy((student, optimizer))
        for name, parameter in other.named_parameters():
            parameter.grad = gradient[name]
        own.step()
        assert exact.error(stepped, models.trainable(other)) < 1e-14

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_preconditioner_is_the_jacobian_of_the_step(self, steps):
        """By automatic differentiation of the step itself: the bias correction and the sign of the second term."""
        student, batch, optimizer = trained(steps)
        parameters = models.trainable(student)
        gradient = {name: value.requires_grad_() for name, value in pilot.gradient(student, parameters, batch).items()}
        state = pilot.adamw_state(optimizer, dict(student.named_parameters()))
        stepped = pilot.adamw(parameters, gradient, state)
        slopes = pilot.adamw_preconditioner({name: value.detach() for name, value in gradient.items()}, state)
        for name, value in stepped.items():
            # The step works weight by weight, so the sum's gradient is the diagonal of the Jacobian.
            (expected,) = torch.autograd.grad(value.sum(), gradient[name])
            assert exact.error(-state.learning_rate * slopes[name], expected) < 1e-10, name

    def test_preconditioner_is_zero_where_no_gradient_ever_was(self):
        student, batch, optimizer = trained(1, student=exact.bert())
        parameters, name = models.trainable(student), "bert.embeddings.word_embeddings.weight"
        gradient = pilot.gradient(student, parameters, batch)
        state = pilot.adamw_state(optimizer, dict(student.named_parameters()))
        slopes = pilot.adamw_preconditioner(gradient, state)
        seen = torch.zeros(len(gradient[name]), dtype=torch.bool)
        for inputs in (batch, exact.batch(5, 1)):
            seen[inputs["input_ids"][inputs["attention_mask"] == 1]] = True
        assert 0 < seen.sum() < len(seen)
        assert (slopes[name][~seen] == 0).all() and (slopes[name][seen] != 0).all()
        assert all(value.isfinite().all() for value in slopes.values())

    def test_an_optimiser_of_another_network_is_refused(self):
        optimizer = trained(1)[2]
        student = exact.perceptron()
        with pytest.raises(ValueError, match=r"does not hold first.weight, first.bias, norm.weight and 3 more"):
            pilot.adamw_state(optimizer, dict(student.named_parameters()))


@pytest.mark.parametrize("learning_rate", [-0.1, float("inf"), float("nan")])
def test_a_learning_rate_that_is_none_is_refused(learning_rate):
    with pytest.raises(ValueError, match="expected a finite number ≥ 0"):
        pilot.sgd({}, {}, learning_rate)
