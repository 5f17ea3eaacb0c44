"""Pilot steps: where the student would be after one step, while the student itself stays where it is.

A pilot step takes parameters, a dict from name to tensor, and returns new ones; the module only says what to compute
with them.  Dropout is off, so that the step descends the same function whose derivatives `kdlib.influence` takes.

An update rule is a function of parameters and gradient, as `sgd` is, and the step is the rule at the gradient; another
rule needs no change elsewhere.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kdlib import losses, models
from kdlib.models import Outputs, Parameters

Loss = Callable[[Outputs, Mapping[str, Tensor]], Tensor]
"""`loss(outputs, batch)`: one value per sample, `(batch,)`, from the student's outputs and whatever the batch holds
(labels, the teacher's logits)."""


def task_loss(outputs: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
    """The task's own loss per sample, `(batch,)`, on the labels in the batch; see `losses.task_loss`."""
    return losses.task_loss(outputs.logits, batch["labels"], "none")


def gradient(
    student: nn.Module,
    parameters: Parameters,
    batch: Mapping[str, Tensor],
    loss: Loss = task_loss,
    create_graph: bool = False,
    **wanted: bool,
) -> Parameters:
    """The gradient of the mean loss at `parameters`, by name; zero for a parameter that plays no part.

    With `create_graph=True` it can be differentiated in whatever the loss contains, for example the teacher's logits.
    `wanted` is passed on to `models.apply`: `hidden_states=True`, `attentions=True`.

    Raises what `models.apply` and the loss raise.

    Source: LGTM eq. (2), the gradient in it.  Derived in: chapters/01_distillation.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad(), models.evaluating(student), models.exact_attention(student):
        mean = loss(models.apply(student, leaves, batch, **wanted), batch).mean()
        values = torch.autograd.grad(mean, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(leaves, values, strict=True))


def sgd(parameters: Parameters, gradient: Parameters, learning_rate: float) -> Parameters:
    """Plain gradient descent, θ − η ∇L.

    Raises ValueError unless the learning rate is a finite number that is not negative.
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"learning_rate is {learning_rate}; expected a finite number ≥ 0")
    return {name: value - learning_rate * gradient[name] for name, value in parameters.items()}


def sgd_step(
    student: nn.Module,
    parameters: Parameters,
    batch: Mapping[str, Tensor],
    loss: Loss,
    learning_rate: float,
    create_graph: bool = False,
    **wanted: bool,
) -> Parameters:
    """The pilot student θ_s' = θ_s − η_s ∇ mean_i ℓ_i: new parameters; `student` and `parameters` stay as they are.

    `create_graph=True` lets a loss of the pilot student be differentiated in the teacher, the expensive way to the
    meta-gradient.  The other arguments and the errors are those of `gradient` and `sgd`.

    Source: LGTM Algorithm 1, line 4; MetaDistil Algorithm 1, the student's temporary copy.
    Derived in: chapters/02_influence.
    """
    descent = gradient(student, parameters, batch, loss, create_graph, **wanted)
    with torch.enable_grad():
        return sgd({name: value.detach() for name, value in parameters.items()}, descent, learning_rate)
