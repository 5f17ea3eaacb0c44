"""One optimiser step: micro-batches, clipping, weight decay, non-finite losses, device and precision."""

import copy
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from kdlib import losses
from kdlib.learner import NonFiniteLossError, accelerator_for, learner, minimise_together, split, weight_decay_groups
from kdlib.models import logits
from kdlib.trainer import training_batch
from tests import pairs, toy


def batch(size: int = 10) -> dict[str, torch.Tensor]:
    return training_batch(toy.encoded(), list(range(size)), torch.device("cpu"))


def loss_of(who):
    return lambda piece: losses.task_loss(logits(who.module, piece), piece["labels"], "none")


@pytest.mark.parametrize("pieces", [2, 3, 10, 64])
def test_micro_batches_give_the_step_of_the_whole_batch(pieces):
    """Pieces of 10 samples are of unequal size for 3: a mean of means would differ."""
    whole, cut = toy.student(dropout=0), toy.student(dropout=0, micro_batches=pieces)
    for who in (whole, cut):
        who.seen = []
        for _ in range(3):
            value = who.minimise(lambda piece, who=who: (who.seen.append(piece), loss_of(who)(piece))[1], batch())
        who.final = value
    assert len(whole.seen) == 3 and len(cut.seen) == 3 * min(pieces, 10)
    assert cut.final == pytest.approx(whole.final, rel=1e-5)
    for ours, theirs in zip(cut.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-6)


def test_split_keeps_every_sample_in_order():
    pieces = split(batch(7), 3)
    assert [len(piece["labels"]) for piece in pieces] == [3, 2, 2]
    torch.testing.assert_close(torch.cat([piece["rows"] for piece in pieces]), batch(7)["rows"])


def test_the_step_is_adamw_of_torch():
    """Against the same step written by hand: clip, AdamW, scheduled learning rate."""
    who = toy.student(dropout=0, total_steps=10, warmup_ratio=0.5, max_grad_norm=0.1, weight_decay=0.1)
    other = copy.deepcopy(who.module)
    optimizer = torch.optim.AdamW(weight_decay_groups(other, 0.1), lr=1e-3)
    other.train()
    who.module.train()
    for step in range(4):
        value = who.minimise(loss_of(who), batch())
        loss = torch.nn.functional.cross_entropy(logits(other, batch()), batch()["labels"])
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1) > 0.1
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * step / 5
        optimizer.step()
        optimizer.zero_grad()
        assert value == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(who.module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def line(rate: float = 1.0, steps: int = 10, name: str = "line", **options):
    """A learner of two weights, and the loss that makes it one: the smallest that has a schedule."""
    module = nn.Linear(1, 1).double()
    nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
    return learner(name, module, accelerator_for("cpu"), rate, steps, **options)


def points(size: int = 6) -> dict[str, torch.Tensor]:
    rows = torch.arange(size)
    return {"x": rows.double().unsqueeze(1) + 1, "labels": torch.zeros(size), "rows": rows}


def size_of(who):
    return lambda piece: who.module(piece["x"]).squeeze(1).square()


@settings(max_examples=10)
@given(st.integers(1, 24), st.integers(0, 100))
@example(5, 50)  # 2.5 steps: round() gives 2
@example(7, 50)  # 3.5: 4
@example(3, 0)
@example(4, 100)
def test_the_rate_rises_linearly_and_falls_linearly_to_zero(steps, percent):
    """In whole numbers: rate · k/w up to step w = ratio · steps, rounded half to even; then (steps − k)/(steps − w)."""
    ratio = percent / 100
    who, taken = line(0.5, steps, warmup_ratio=ratio), []
    who.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: taken.append([group["lr"] for group in optimizer.param_groups])
    )
    for _ in range(steps):
        who.minimise(size_of(who), points(2))
    rise = int(Decimal(repr(ratio * steps)).quantize(Decimal(1), ROUND_HALF_EVEN))
    expected = [0.5 * k / rise if k < rise else 0.5 * (steps - k) / (steps - rise) for k in range(steps)]
    assert taken == [pytest.approx([rate, rate]) for rate in expected]
    assert who.schedule.get_last_lr() == [0.0, 0.0]


def test_who_names_nothing_gets_a_tenth_of_warm_up_a_hundredth_of_decay_a_norm_of_one_and_the_whole_batch():
    who, norms, pieces, rates = line(steps=30), [], [], []

    def before(optimizer, *_):
        norms.append(torch.stack([p.grad.norm() for p in who.module.parameters()]).norm().item())
        rates.append(optimizer.param_groups[0]["lr"])

    who.optimizer.optimizer.register_step_pre_hook(before)
    for _ in range(5):
        who.minimise(lambda piece: (pieces.append(len(piece["labels"])), size_of(who)(piece))[1], points())
    assert [group["weight_decay"] for group in who.optimizer.param_groups] == [0.01, 0.0]
    assert norms == [pytest.approx(1.0)] * 5  # clipped: they are larger by far
    assert pieces == [6] * 5
    assert rates == pytest.approx([0, 1 / 3, 2 / 3, 1, 26 / 27])


class TestTogether:
    @staticmethod
    def two(**options):
        """Two learners that differ in everything that a step uses; the second one clips at less."""
        one = line(0.1, 20, "one", warmup_ratio=0.0, max_grad_norm=3.0, **options)
        other = line(0.3, 30, "other", warmup_ratio=0.0, max_grad_norm=0.5, weight_decay=0.2, **options)
        return one, other

    @pytest.mark.parametrize("pieces", [1, 4])
    def test_each_takes_the_step_that_it_would_take_alone(self, pieces):
        """Its own loss, norm, rate and decay; the other's number is the other's."""
        together, alone = self.two(micro_batches=pieces), self.two()
        losses_of = [size_of(together[0]), lambda piece: 5 * size_of(together[1])(piece)]
        losses_alone = [size_of(alone[0]), lambda piece: 5 * size_of(alone[1])(piece)]
        for _ in range(3):
            values = minimise_together([*together], lambda piece: [loss(piece) for loss in losses_of], points())
            expected = [who.minimise(loss, points()) for who, loss in zip(alone, losses_alone, strict=True)]
            assert values == pytest.approx(expected, rel=1e-12)
        for ours, theirs in zip(together, alone, strict=True):
            for one, two in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
            assert ours.schedule.get_last_lr() == theirs.schedule.get_last_lr()

    @pytest.mark.parametrize("wrong", [0, 1])
    @pytest.mark.parametrize("how", ["value", "gradient"])
    def test_nobody_moves_if_one_of_them_fails_and_no_gradient_is_left(self, wrong, how):
        """A loss that is no number though its gradient is finite, and a gradient that is none though the loss is."""
        both = self.two()
        before = [copy.deepcopy(who.module.state_dict()) for who in both]

        def loss_of(number, piece):
            loss = size_of(both[number])(piece)
            if number != wrong:
                return loss
            return loss + torch.tensor(float("nan")) if how == "value" else loss + 0 * (0 * loss).sqrt()

        with pytest.raises(NonFiniteLossError, match=rf"the {both[wrong].name} is .* rows \[0, 1, 2\]") as caught:
            minimise_together([*both], lambda piece: [loss_of(0, piece), loss_of(1, piece)], points(3))
        assert caught.value.rows == [0, 1, 2]
        for who, weights in zip(both, before, strict=True):
            assert all(torch.equal(value, weights[name]) for name, value in who.module.state_dict().items())
            assert all(parameter.grad is None for parameter in who.module.parameters())
            assert who.schedule.state_dict()["last_epoch"] == 0


def test_biases_and_layer_norms_are_not_decayed():
    module = toy.network()
    decayed, free = weight_decay_groups(module, 0.01)
    names = {id(p): name for name, p in module.named_parameters()}
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and "LayerNorm" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or "LayerNorm" in names[id(p)] for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.parameters()))


def test_frozen_parameters_are_not_given_to_the_optimiser():
    module = toy.network()
    module.bert.embeddings.requires_grad_(False)
    count = sum(len(group["params"]) for group in weight_decay_groups(module, 0.01))
    assert count == len([p for p in module.parameters() if p.requires_grad]) < len(list(module.parameters()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_weights_change(poison):
    who = toy.student()
    before = copy.deepcopy(who.module.state_dict())
    with pytest.raises(NonFiniteLossError, match=r"student.*rows \[1000, 1001, 1002\]") as caught:
        who.minimise(lambda piece: loss_of(who)(piece) * poison, batch(3))
    assert caught.value.rows == [1000, 1001, 1002]
    for name, tensor in who.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in who.module.parameters())


def test_a_finite_loss_with_an_infinite_gradient_stops_too():
    who = toy.student()
    weight = next(who.module.parameters())
    with pytest.raises(NonFiniteLossError, match="norm"):
        who.minimise(lambda piece: torch.sqrt((weight * 0).sum() + torch.zeros(len(piece["labels"]))), batch(3))


def test_bfloat16_trains_on_the_cpu_and_keeps_float32_weights():
    accelerator = accelerator_for("cpu", "bf16")
    who = learner("student", toy.network(), accelerator, 1e-3, 5)
    passes = pairs.precisions(who)
    first = who.minimise(loss_of(who), batch())
    assert passes == [("student", torch.bfloat16)]
    assert all(p.dtype == torch.float32 for p in who.module.parameters())
    exact = toy.student()
    assert first == pytest.approx(exact.minimise(loss_of(exact), batch()), rel=0.05)


def test_two_precisions_in_one_process():
    assert accelerator_for("cpu", "bf16").mixed_precision == "bf16"
    assert accelerator_for("cpu", "fp32").mixed_precision == "no"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", "fp64"), "precision is 'fp64'; expected one of fp32, bf16, fp16"),
        (("tpu", "fp32"), "device is 'tpu'"),
        (("cpu", "fp16"), "needs a GPU"),
    ],
)
def test_impossible_devices_and_precisions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        accelerator_for(*arguments)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU; use 'auto' or 'cpu'"):
        accelerator_for("cuda")
