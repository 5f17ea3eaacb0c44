"""Which sample helps?  Inner products of per-sample gradients with a direction, without the gradients.

For a direction v in the student's parameters, ⟨∇ℓ_i, v⟩ is the derivative of sample i's loss along v.  The network
enters it only through its *tangent*, the derivative of its outputs along v, which one forward-mode pass gives for a
whole batch; the rest is a derivative of the loss in a few numbers per sample:

    outputs, tangents = student_tangent(student, parameters, batch, feedback_gradient(...))
    influences = distillation_influence(objective, outputs.logits, tangents.logits, teacher_logits)

The same holds for TracIn and for classical influence functions, see `kdlib.influence`; only the direction differs.

Tangents are constants here, never part of a graph: torch differentiates LayerNorm's forward-mode derivative wrongly a
second time, and nothing in the book needs that.  What depends on the teacher can be differentiated in it.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from kdlib import models, pilot, processes
from kdlib.models import Outputs, Parameters, WantedOutputs
from kdlib.pilot import Loss, task_loss

Batch = Mapping[str, Tensor]
TangentMethod = Literal["jvp", "finite-difference", "forward-difference", "double-backward"]

RADIUS = 0.01
"""How far a finite difference moves the parameters, ε‖v‖: the rule ε = 0.01/‖v‖ of DARTS and of LGTM's code."""


# --- The tangent ---------------------------------------------------------------------------------------------------


def student_tangent(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    direction: Parameters,
    method: TangentMethod = "jvp",
    radius: float = RADIUS,
    outputs: Outputs | None = None,
    **wanted: Unpack[WantedOutputs],
) -> tuple[Outputs, Outputs]:
    """The student's outputs at `parameters` and their derivative along `direction`: logits `(batch, classes)` each.

    With `hidden_states=True` or `attentions=True` both carry those too.  `direction` has the names and shapes of
    `parameters`.  The methods:

    * "jvp": one forward-mode pass; exact.
    * "finite-difference": (f(θ + εv) − f(θ − εv)) / 2ε with ε = `radius`/‖v‖, and one more pass for the outputs,
      unless they are known already and given as `outputs`.
    * "forward-difference": (f(θ + εv) − f(θ)) / ε, one pass fewer, and an error of the order of ε in place of ε².
    * "double-backward": two reverse passes; exact, and keeps a graph of the first.

    Dropout is off.  The module, its mode and its attention are as before afterwards, and no number in it is touched.
    Several processes share the rows of the batch.

    Raises ValueError for an unknown method, a direction that has other names or shapes than the parameters or is not
    finite, and a radius that is not positive; also what `models.apply` raises.

    Source: LGTM eqs. (8), (10): the part of the student.  Derived in: chapters/03_finite_differences.
    """
    _check_choice(method, get_args(TangentMethod), "method")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius is {radius}; expected a positive, finite number")
    here, along = _at_and_along(parameters, direction)

    def of_rows(rows: Batch, known: Outputs | None) -> tuple[Outputs, Outputs]:
        def network(values: Parameters) -> Outputs:
            return models.apply(student, values, rows, **wanted)

        if method == "jvp":
            return jvp(network, (here,), (along,))[:2]
        if method.endswith("difference"):
            known = network(here) if known is None else known
            behind = None if method == "finite-difference" else known
            return known, _difference(network, here, along, radius, behind)
        return _double_backward(network, here, along)

    with torch.no_grad(), models.evaluating(student), _attention(student, method, wanted):
        return processes.by_rows(of_rows, dict(batch), outputs)


def _attention(student: nn.Module, method: str, wanted: WantedOutputs) -> AbstractContextManager[None]:
    """Plain passes, as a finite difference takes, can use the fast attention, unless its weights are asked for."""
    fast = method.endswith("difference") and not wanted.get("attentions")
    return nullcontext() if fast else models.exact_attention(student)


def _at_and_along(parameters: Parameters, direction: Parameters) -> tuple[Parameters, Parameters]:
    check_direction(parameters, direction)
    here = {name: value.detach() for name, value in parameters.items()}
    return here, {name: direction[name].detach().to(value.dtype) for name, value in here.items()}


def _difference(
    function: Callable[[Parameters], Any], here: Parameters, along: Parameters, radius: float, behind: Any = None
) -> Any:
    """(f(θ + εv) − f(θ − εv)) / 2ε with ε = radius/‖v‖; zero along a zero direction.

    With f(θ) known and given as `behind` the one-sided quotient, one pass in place of two.
    """
    size = torch.stack([value.abs().max() for value in along.values()]).max().item()
    if size == 0:
        return tree_map(torch.zeros_like, function(here) if behind is None else behind)
    # Divided by its largest entry first, so that squares neither overflow nor vanish.
    norm = size * math.sqrt(torch.stack([(value / size).square().sum() for value in along.values()]).sum().item())
    step, length = {name: radius * (value / norm) for name, value in along.items()}, radius
    ahead = function({name: value + step[name] for name, value in here.items()})
    if behind is None:
        behind, length = function({name: value - step[name] for name, value in here.items()}), 2 * radius
    return tree_map(lambda a, b: (a - b) * (norm / length), ahead, behind)


def _double_backward(
    network: Callable[[Parameters], Outputs], here: Parameters, along: Parameters
) -> tuple[Outputs, Outputs]:
    """Jᵀu is linear in u, and the derivative of ⟨Jᵀu, v⟩ in u is Jv, whatever u is."""
    with torch.enable_grad():
        leaves = {name: value.requires_grad_() for name, value in here.items()}
        outputs, structure = tree_flatten(network(leaves))
        weights = [torch.zeros_like(value, requires_grad=True) for value in outputs]
        total = _added((weight * value).sum() for weight, value in zip(weights, outputs, strict=True))
        transposed = torch.autograd.grad(total, list(leaves.values()), create_graph=True, materialize_grads=True)
        paired = _added((value * along[name]).sum() for name, value in zip(leaves, transposed, strict=True))
        tangents = torch.autograd.grad(paired, weights, materialize_grads=True)
    return tree_unflatten([value.detach() for value in outputs], structure), tree_unflatten(list(tangents), structure)


def _added(values: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, values)


def check_direction(parameters: Parameters, direction: Parameters) -> None:
    """Raise ValueError, naming the parameter, if names or shapes differ or an entry is NaN or infinite."""
    missing = [name for name in parameters if name not in direction]
    extra = [name for name in direction if name not in parameters]
    if missing or extra:
        parts = [f"lacks {models.some(missing)}"] if missing else []
        parts += [f"has {models.some(extra)}, which no parameter is called"] if extra else []
        raise ValueError(f"the direction {' and '.join(parts)}: it needs one tensor for each parameter that moves")
    for name, value in parameters.items():
        if direction[name].shape != value.shape:
            raise ValueError(
                f"the direction of {name} has shape {tuple(direction[name].shape)}, the parameter {tuple(value.shape)}"
            )
    largest = torch.stack([direction[name].detach().abs().max() for name in parameters]).tolist()
    for name, value in zip(parameters, largest, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the direction of {name} has an entry that is {value}: the loss it is the gradient of has diverged"
            )


# --- Distillation influence and the meta-gradient ------------------------------------------------------------------


def feedback_gradient(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss = task_loss,
    among: Collection[str] | None = None,
    pieces: int = 1,
    **wanted: Unpack[WantedOutputs],
) -> Parameters:
    """g = ∇L(e; θ), the gradient of the mean feedback loss at the parameters given: those of the *pilot* student.

    With `among` only its part in the parameters of these names, for example `models.last_layers`: the backward pass
    then ends where they do.  `pieces` cuts the batch, for less memory.

    Raises what `pilot.gradient` raises.

    Source: LGTM eq. (5), and the second factor of eq. (8); MetaDistil Algorithm 1, the quiz.
    Derived in: chapters/02_influence.
    """
    return pilot.gradient(student, parameters, batch, loss, among=among, pieces=pieces, **wanted)


def distillation_influence(
    objective: Callable[..., Float[Tensor, "batch"]],
    outputs: Any,
    tangents: Any,
    teacher_outputs: Any,
    labels: Tensor | None = None,
) -> Float[Tensor, "batch"]:
    """I_i = d/dε ℓ_i(z_i + ε ż_i): the inner product of sample i's gradient with the tangent's direction.

    Positive: a small step on sample i lowers the feedback loss.  `outputs` and `tangents` come from `student_tangent`:
    the logits alone, or all of it.  `objective(outputs, teacher_outputs)`, or `objective(outputs, teacher_outputs,
    labels)` where labels are given, returns one value per sample, for example
    `partial(losses.distillation_loss, alpha=0.5, temperature=2.0, reduction="none")`.

    The result can be differentiated in `teacher_outputs`; the student's part of it is a constant.

    Raises ValueError if the objective does not return one value per sample; also what the objective raises.

    Source: LGTM eqs. (8), (17).  Derived in: chapters/02_influence.
    """
    targets = (teacher_outputs,) if labels is None else (teacher_outputs, labels)
    return _derivative(lambda values: objective(values, *targets), outputs, tangents)


def meta_gradient_loss(influences: Float[Tensor, "batch"], learning_rate: float) -> Float[Tensor, ""]:
    """−η_s · mean_i I_i: the scalar whose gradient in the teacher is that of the feedback loss after the pilot step.

    Exact for one plain gradient step of the student with learning rate η_s on the mean of the objective, and with
    influences along the feedback gradient at the pilot student.  Its *value* is the first-order change of the feedback
    loss.

    Source: MetaDistil eq. (3) and Algorithm 1, line 6; LGTM eqs. (7), (10), the latter with the sign of descent.
    Derived in: chapters/03_finite_differences.
    """
    return -learning_rate * influences.mean()


def influence_along(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss,
    direction: Parameters,
    method: TangentMethod = "jvp",
    **wanted: Unpack[WantedOutputs],
) -> Float[Tensor, "batch"]:
    """⟨∇ℓ_i, v⟩ for every sample of the batch and any direction v, by one tangent of the student.

    "finite-difference" takes the quotient of the losses themselves: two passes, since nobody asks for the outputs.

    Raises as `student_tangent` and `distillation_influence` do.  Derived in: chapters/02_influence.
    """
    if method != "finite-difference":
        outputs, tangents = student_tangent(student, parameters, batch, direction, method, **wanted)
        return _derivative(lambda values: loss(values, batch), outputs, tangents)
    here, along = _at_and_along(parameters, direction)

    def losses_at(values: Parameters) -> Tensor:
        return _per_sample(loss(models.apply(student, values, batch, **wanted), batch), len(next(iter(batch.values()))))

    with torch.no_grad(), models.evaluating(student), _attention(student, method, wanted):
        return _difference(losses_at, here, along, RADIUS)


def hessian_vector_product(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss,
    vector: Parameters,
    method: Literal["forward-over-reverse", "reverse-over-reverse"] = "forward-over-reverse",
    **wanted: Unpack[WantedOutputs],
) -> Parameters:
    """∇²L · v of the mean loss, by name.

    "forward-over-reverse" is the tangent of the gradient, "reverse-over-reverse" the gradient of ⟨∇L, v⟩.  There is no
    reverse-over-forward: torch gets it wrong for LayerNorm.

    Raises ValueError for an unknown method and as `check_direction` does.  Derived in: chapters/02_influence.
    """
    _check_choice(method, ("forward-over-reverse", "reverse-over-reverse"), "method")
    check_direction(parameters, vector)
    here = {name: value.detach() for name, value in parameters.items()}
    along = {name: vector[name].detach().to(value.dtype) for name, value in here.items()}

    def mean(values: Parameters) -> Tensor:
        return loss(models.apply(student, values, batch, **wanted), batch).mean()

    with torch.enable_grad(), models.evaluating(student), models.exact_attention(student):
        if method == "forward-over-reverse":
            if processes.world_size() > 1:
                return _product_by_rows(student, here, along, batch, loss, **wanted)
            product = jvp(grad(mean), (here,), (along,))[1]
            return {name: value.detach() for name, value in product.items()}
        leaves = {name: value.requires_grad_() for name, value in here.items()}
        tensors = list(leaves.values())
        first = torch.autograd.grad(mean(leaves), tensors, create_graph=True, materialize_grads=True)
        paired = _added((value * along[name]).sum() for name, value in zip(leaves, first, strict=True))
        return dict(zip(leaves, torch.autograd.grad(paired, tensors, materialize_grads=True), strict=True))


def _product_by_rows(
    student: nn.Module, here: Parameters, along: Parameters, batch: Batch, loss: Loss, **wanted: Unpack[WantedOutputs]
) -> Parameters:
    """∇²L · v where each process runs its own rows: the derivative along v of Jᵀu, u = ∂L/∂z of the whole batch.

    u needs all outputs z, and its own derivative all tangents ż; both are gathered first, which takes a pass more.
    """
    own = processes.part(dict(batch))
    rows = own.own(dict(batch))

    def network(values: Parameters) -> Outputs:
        return models.apply(student, values, rows, **wanted)

    moving = own.gathered(jvp(network, (here,), (along,)))
    outputs, tangents = tree_map(Tensor.detach, moving)

    def mean(values: Outputs) -> Tensor:
        return loss(values, batch).mean()

    slopes = jvp(grad(mean), (outputs,), (tangents,))
    # An idle process runs a row that is another's.
    u, du = tree_map(torch.zeros_like if own.idle else Tensor.detach, own.own(slopes))

    def pulled_back(values: Parameters, weights: Outputs) -> Parameters:
        def paired(place: Parameters) -> Tensor:
            answers = zip(tree_leaves(network(place)), tree_leaves(weights), strict=True)
            return sum((one * weight).sum() for one, weight in answers)

        return grad(paired)(values)

    return processes.summed(tree_map(Tensor.detach, jvp(pulled_back, (here, u), (along, du))[1]))


def _derivative(function: Callable[[Any], Tensor], outputs: Any, tangents: Any) -> Float[Tensor, "batch"]:
    outputs, tangents = (tree_map(Tensor.detach, tree) for tree in (outputs, tangents))
    values, derivatives = jvp(function, (outputs,), (tangents,))[:2]
    _per_sample(values, len(tree_leaves(outputs)[0]))
    return derivatives


def _per_sample(values: Tensor, samples: int) -> Tensor:
    if values.shape != (samples,):
        raise ValueError(
            f"the objective returned shape {tuple(values.shape)} for {samples} samples, expected ({samples},): "
            "one value per sample, reduction='none'"
        )
    return values


def _check_choice(value: str, valid: tuple[str, ...], what: str) -> None:
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"{what} is {value!r}: {hint}expected one of {', '.join(map(repr, valid))}")
