"""Vanilla distillation: the mixture, its limits, the step."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kdlib import losses, models
from kdlib.learner import accelerator_for, learner
from kdlib.methods import kd
from kdlib.methods.kd import KD
from kdlib.models import Outputs, logits
from tests import exact, toy
from tests.test_learner import batch

STUDENT = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])


@given(st.floats(0, 1), st.floats(0.5, 8))
def test_the_loss_is_linear_in_alpha_between_labels_and_teacher(alpha, temperature):
    at = {
        a: losses.distillation_loss(STUDENT, TEACHER, LABELS, a, temperature, reduction="none")
        for a in (0.0, alpha, 1.0)
    }
    torch.testing.assert_close(at[1.0], losses.cross_entropy(STUDENT, LABELS, "none"))
    torch.testing.assert_close(at[0.0], losses.kl_divergence(STUDENT, TEACHER, temperature, reduction="none"))
    torch.testing.assert_close(at[alpha], alpha * at[1.0] + (1 - alpha) * at[0.0])


def test_at_temperature_one_the_gradient_is_that_of_one_mixed_target():
    """α·one-hot + (1 − α)·p_t as the target of a cross entropy: an independent statement of eq. (1)'s gradient."""
    alpha, student = 0.3, STUDENT.clone().requires_grad_()
    losses.distillation_loss(student, TEACHER, LABELS, alpha, 1.0, reduction="sum").backward()
    target = alpha * torch.nn.functional.one_hot(LABELS, 3) + (1 - alpha) * TEACHER.softmax(-1)
    torch.testing.assert_close(student.grad, STUDENT.softmax(-1) - target)


def test_regression_mixes_squared_errors():
    student, teacher, scores = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([2.0])
    loss = losses.distillation_loss(student, teacher, scores, 0.25, objective=losses.logit_mse)
    assert loss.item() == pytest.approx(0.25 * 1 + 0.75 * 4)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}"):
        losses.distillation_loss(STUDENT, TEACHER, LABELS, alpha)


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
def test_the_step_lowers_the_loss_for_every_objective(objective):
    who, data = toy.student(dropout=0, warmup_ratio=0.0), batch()
    teacher = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    step = kd.distillation(who, lambda b: Outputs(teacher[b["positions"]]), KD(objective=objective))
    values = [step(data)["loss"] for _ in range(8)]
    assert values[-1] < values[0]


def test_the_teacher_gets_no_gradient_and_micro_batches_look_up_their_own_rows():
    teacher = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    ends = []
    for pieces in (1, 3):
        who = toy.student(dropout=0, micro_batches=pieces)
        for _ in range(3):
            value = kd.distillation(who, lambda b: Outputs(teacher[b["positions"]]), KD(alpha=0.2, temperature=3.0))(
                batch()
            )
        ends.append(value["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.parametrize("rule", ["labels", "teacher"])
@pytest.mark.parametrize("classes", [3, 1])
def test_a_step_is_that_of_plain_torch_dropout_and_hidden_states_included(rule, classes):
    """Written out with the same random numbers; a head of one output learns scores."""
    data = exact.batch(6, 0) if classes > 1 else exact.batch(6, 0) | {"labels": torch.linspace(-1, 2, 6).double()}
    student = toy.network(0, classes, 0.5, 2).double().train()
    with torch.no_grad():
        example = models.outputs(toy.network(1, classes, layers=2).double(), data, hidden_states=True)
    objective = "kl" if classes > 1 else "logit_mse"
    settings = KD(alpha=0.3, objective=objective, pkd_weight=0.7)
    who = learner("student", student, accelerator_for("cpu"), 1e-2, 100, 0.0, warmup_ratio=0.0)
    plain = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    torch.manual_seed(5)
    if rule == "labels":
        value = kd.fine_tuning(who)(data)
    else:
        value = kd.distillation(who, lambda _: example, settings)(data)

    torch.manual_seed(5)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    own = plain(**inputs, output_hidden_states=True)
    squares = (own.logits[:, 0] - data["labels"]).square().mean()
    loss = F.cross_entropy(own.logits, data["labels"]) if classes > 1 else squares
    if rule == "teacher":
        ours, theirs = ((z.logits / 2).log_softmax(-1) for z in (own, example))
        soft = 4 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        soft = soft if classes > 1 else (own.logits - example.logits).square().mean()
        a, b = (F.normalize(z.hidden_states[1][:, 0], dim=-1) for z in (own, example))
        loss = 0.3 * loss + 0.7 * soft + 0.7 * (a - b).square().sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    assert value == {"loss": pytest.approx(loss.item(), rel=1e-9)}
    assert exact.error(models.trainable(student), models.trainable(plain)) < 1e-9


def nothing(batch) -> Outputs:
    return Outputs(torch.zeros(10, 2))


def test_fine_tuning_is_distillation_with_labels_only():
    ends = []
    for step_of in (kd.fine_tuning, lambda who: kd.distillation(who, nothing, KD(alpha=1.0))):
        who = toy.student(dropout=0)
        step = step_of(who)
        ends.append([step(batch())["loss"] for _ in range(4)])
    assert ends[0] == pytest.approx(ends[1])


def test_logits_are_float32_under_autocast():
    who = toy.student()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(who.module, batch()).dtype == torch.float32
