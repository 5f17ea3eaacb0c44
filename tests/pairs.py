"""Teacher and student in float64 with their optimisers, and the same in plain torch, for the tests of the methods."""

import copy

import torch
from torch import nn

from kdlib import models
from kdlib.learner import Learner, accelerator_for, learner
from tests import exact

RATE, DECAY = 1e-2, 0.01


def pair(dropout: float = 0.0, rate: float = RATE, **options) -> tuple[Learner, Learner]:
    """A student of two layers and a teacher of three that disagree, in training mode."""
    options = {"warmup_ratio": 0.0, "weight_decay": DECAY, **options}
    return tuple(
        learner(name, exact.bert(seed, layers, dropout), accelerator_for("cpu"), rate, 100, **options)
        for seed, (name, layers) in enumerate((("student", 2), ("teacher", 3)))
    )


class Plain:
    """The same network and optimiser, written out: AdamW with two groups, clipping, no schedule yet."""

    def __init__(self, who: Learner):
        self.module, self.longest = copy.deepcopy(who.module).eval(), who.max_grad_norm
        self.module.set_attn_implementation("eager")
        self.parameters = dict(self.module.named_parameters())
        groups = [[p for p in self.parameters.values() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (DECAY, 0.0), strict=True)],
            lr=RATE,
        )
        self.optimizer.load_state_dict(copy.deepcopy(who.optimizer.state_dict()))  # else they would share moments

    def answers(self, batch, parameters=None) -> models.Outputs:
        return models.apply(self.module, parameters or self.parameters, batch, hidden_states=True)

    def descend(self, loss: torch.Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = torch.nan_to_num(gradient)  # through AdamW, a word in no batch has 0/0
        nn.utils.clip_grad_norm_(self.parameters.values(), self.longest)
        self.optimizer.step()
        self.optimizer.zero_grad()


def constants(outputs: models.Outputs) -> models.Outputs:
    return models.Outputs(outputs.logits.detach(), tuple(states.detach() for states in outputs.hidden_states))


def difference(who: Learner, plain: Plain) -> float:
    return exact.error(models.trainable(who.module), models.trainable(plain.module))


def weights(who: Learner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in who.module.state_dict().items()}


def state(who: Learner) -> dict:
    """All that a step of this learner changes, copied."""
    return copy.deepcopy([who.module.state_dict(), who.optimizer.state_dict(), who.schedule.state_dict()])


def same(first, second) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def precisions(*learners: Learner) -> list[tuple[str, torch.dtype]]:
    """Who ran, and in which precision a matrix product inside the encoder answered: filled pass by pass from now on."""
    passes: list[tuple[str, torch.dtype]] = []
    for who in learners:
        inside = who.module.bert.encoder.layer[0].intermediate.dense
        inside.register_forward_hook(lambda _, inputs, output, name=who.name: passes.append((name, output.dtype)))
    return passes
