"""Small networks in float64 and cases for the tests of derivatives, where 1e-10 means something."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import BertForSequenceClassification

from kdlib import losses
from kdlib.batches import collate
from kdlib.learner import Learner, accelerator_for, learner, weight_decay_groups
from kdlib.models import Outputs
from tests import toy

CLASSES = 3
HIDDEN = 32


def bert(seed: int = 0, layers: int = 2, dropout: float = 0.5) -> BertForSequenceClassification:
    """A tiny BERT with weights large enough that it is far from linear; in training mode, with dropout, on purpose."""
    network = toy.network(seed, CLASSES, dropout, layers)
    network.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return network.double().train()


def batch(samples: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sequences of different lengths, padded; three classes."""
    collated = collate(toy.encoded(samples, seed), range(samples))
    generator = torch.Generator().manual_seed(seed)
    return collated | {"labels": torch.randint(0, CLASSES, (samples,), generator=generator)}


def direction(parameters: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in parameters.items()
    }


class Normalised(nn.Module):
    """A perceptron with a BatchNorm, whose buffers a forward pass in training mode would change."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, features):
        return self.last(torch.tanh(self.norm(self.first(features))))


def perceptron(seed: int = 0) -> Normalised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Normalised().double().train()


def features(samples: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return {"features": values, "labels": torch.randint(0, CLASSES, (samples,), generator=generator)}


def error(actual, expected) -> float:
    """‖actual − expected‖ / ‖expected‖, over all tensors of two trees together."""
    actual, expected = (
        torch.cat([leaf.detach().flatten() for leaf in tree_leaves(tree)]) for tree in (actual, expected)
    )
    return ((actual - expected).norm() / expected.norm()).item()


def on_logits(objective, **settings):
    return lambda student, teacher, labels: objective(student.logits, teacher.logits, reduction="none", **settings)


def mixture(objective, **settings):
    return lambda student, teacher, labels: losses.distillation_loss(
        student.logits, teacher.logits, labels, objective=objective, reduction="none", **settings
    )


def patient(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """KL plus the distance of the normalised first tokens of every layer, in the manner of PKD."""
    distance = torch.zeros(len(labels), dtype=torch.float64)
    for ours, theirs in zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True):
        ours, theirs = (nn.functional.normalize(states[:, 0], dim=-1) for states in (ours, theirs))
        distance = distance + (ours - theirs).square().sum(-1)
    return losses.kl_divergence(student.logits, teacher.logits, 2.0, reduction="none") + distance


CASES = {
    **{f"{name} at {t}": on_logits(f, temperature=t) for name, f in losses.OBJECTIVES.items() for t in (1.0, 3.0)},
    **{f"mixture with {name}": mixture(f, alpha=0.3, temperature=2.0) for name, f in losses.OBJECTIVES.items()},
    "labels only": mixture(losses.kl_divergence, alpha=1.0),
    "patient": patient,
}
"""Objectives by name, each called as `objective(student outputs, teacher outputs, labels)`."""


def learners(dropout: float = 0.0, accelerator=None, **options) -> tuple[Learner, Learner]:
    """A student of two layers and a teacher of three, in training mode, in float64."""
    accelerator = accelerator or accelerator_for("cpu")
    options = {"learning_rate": 1e-2, "total_steps": 100, "warmup_ratio": 0.0, **options}
    return (
        learner("student", bert(0, 2, dropout), accelerator, **options),
        learner("teacher", bert(1, 3, dropout), accelerator, **options),
    )


def twin(who: Learner) -> tuple[nn.Module, torch.optim.AdamW]:
    """A copy of a learner as plain torch has it: slow attention, no dropout, AdamW in the same state, not fused."""
    module = copy.deepcopy(who.module).eval()
    module.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(weight_decay_groups(module, 0.0), foreach=False)
    optimizer.load_state_dict(copy.deepcopy(who.optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["fused"] = False
    return module, optimizer


def descend(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients that are there to a norm of one, and step."""
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
