"""One optimiser step: micro-batches, clipping, weight decay, non-finite losses, device and precision."""

import copy

import pytest
import torch

from kdlib import losses
from kdlib.learner import NonFiniteLossError, accelerator_for, learner, split, weight_decay_groups
from kdlib.models import logits
from kdlib.trainer import training_batch
from tests import toy


def batch(size: int = 10) -> dict[str, torch.Tensor]:
    return training_batch(toy.encoded(), list(range(size)), torch.device("cpu"))


def loss_of(who):
    return lambda piece: losses.task_loss(logits(who.module, piece), piece["labels"], "none")


@pytest.mark.parametrize("pieces", [2, 3, 10, 64])
def test_micro_batches_give_the_step_of_the_whole_batch(pieces):
    """Pieces of 10 samples are of unequal size for 3: a mean of means would differ."""
    whole, cut = toy.student(dropout=0), toy.student(dropout=0, micro_batches=pieces)
    for who in (whole, cut):
        for _ in range(3):
            value = who.minimise(loss_of(who), batch())
        who.final = value
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
    first = who.minimise(loss_of(who), batch())
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
