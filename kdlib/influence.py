"""Which sample helps?  Inner products of per-sample gradients with a direction, without the gradients.

For a direction v in the student's parameters, ⟨∇ℓ_i, v⟩ is the derivative of sample i's loss along v.  The network
enters it only through its *tangent*, the derivative of its outputs along v, which one forward-mode pass gives for a
whole batch; the rest is a derivative of the loss in a few numbers per sample:

    outputs, tangents = student_tangent(student, parameters, batch, feedback_gradient(...))
    influences = distillation_influence(objective, outputs.logits, tangents.logits, teacher_logits)

The same holds for TracIn and for classical influence functions; only the direction differs.

Tangents are constants here, never part of a graph: torch differentiates LayerNorm's forward-mode derivative wrongly a
second time, and nothing in the book needs that.  What depends on the teacher can be differentiated in it.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PreTrainedModel

from kdlib import models, pilot
from kdlib.models import Outputs, Parameters
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
    **wanted: bool,
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

    Raises ValueError for an unknown method, a direction that has other names or shapes than the parameters or is not
    finite, and a radius that is not positive; also what `models.apply` raises.

    Source: LGTM eqs. (8), (10): the part of the student.  Derived in: chapters/03_finite_differences.
    """
    _check_choice(method, TangentMethod.__args__, "method")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius is {radius}; expected a positive, finite number")
    here, along = _at_and_along(parameters, direction)

    def network(values: Parameters) -> Outputs:
        return models.apply(student, values, batch, **wanted)

    with torch.no_grad(), models.evaluating(student), _attention(student, method, wanted):
        if method == "jvp":
            return jvp(network, (here,), (along,))
        if method.endswith("difference"):
            known = network(here) if outputs is None else outputs
            behind = None if method == "finite-difference" else known
            return known, _difference(network, here, along, radius, behind)
        return _double_backward(network, here, along)


def _attention(student: nn.Module, method: str, wanted: Mapping[str, bool]) -> AbstractContextManager:
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
        total = sum((weight * value).sum() for weight, value in zip(weights, outputs, strict=True))
        transposed = torch.autograd.grad(total, list(leaves.values()), create_graph=True, materialize_grads=True)
        paired = sum((value * along[name]).sum() for name, value in zip(leaves, transposed, strict=True))
        tangents = torch.autograd.grad(paired, weights, materialize_grads=True)
    return tree_unflatten([value.detach() for value in outputs], structure), tree_unflatten(list(tangents), structure)


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
    **wanted: bool,
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


def _derivative(function: Callable[[Any], Tensor], outputs: Any, tangents: Any) -> Float[Tensor, "batch"]:
    outputs, tangents = (tree_map(Tensor.detach, tree) for tree in (outputs, tangents))
    values, derivatives = jvp(function, (outputs,), (tangents,))
    _per_sample(values, len(tree_leaves(outputs)[0]))
    return derivatives


def _per_sample(values: Tensor, samples: int) -> Tensor:
    if values.shape != (samples,):
        raise ValueError(
            f"the objective returned shape {tuple(values.shape)} for {samples} samples, expected ({samples},): "
            "one value per sample, reduction='none'"
        )
    return values


# --- The classical tools -------------------------------------------------------------------------------------------


def influence_along(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss,
    direction: Parameters,
    method: TangentMethod = "jvp",
    **wanted: bool,
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


def per_sample_gradients(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss = task_loss,
    method: Literal["loop", "vmap"] = "loop",
    chunk_size: int | None = None,
    **wanted: bool,
) -> Parameters:
    """∇ℓ_i for every sample i: by name, `(batch, *shape of the parameter)`.  Needs batch × parameters of memory.

    "loop" takes the samples one by one; "vmap" computes them together, `chunk_size` at a time.

    Raises ValueError for an unknown method; also what `models.apply` and the loss raise.

    Derived in: chapters/02_influence.
    """
    _check_choice(method, ("loop", "vmap"), "method")
    if method == "loop":
        samples = len(next(iter(batch.values())))
        singles = ({name: value[i : i + 1] for name, value in batch.items()} for i in range(samples))
        rows = [pilot.gradient(student, parameters, single, loss, **wanted) for single in singles]
        return {name: torch.stack([row[name] for row in rows]) for name in parameters}

    here = {name: value.detach() for name, value in parameters.items()}
    inputs = dict(batch)
    if isinstance(student, PreTrainedModel) and "attention_mask" in batch and batch["attention_mask"].dim() == 2:
        inputs["attention_mask"] = models.additive_mask(batch["attention_mask"], next(iter(here.values())).dtype)

    def one(cotangent: Outputs, sample: dict[str, Tensor]) -> Parameters:
        """Jᵀ times the gradient of sample i's loss in its outputs."""
        sample, cotangent = tree_map(lambda value: value[None], (sample, cotangent))
        return vjp(lambda values: models.apply(student, values, sample, **wanted), here)[1](cotangent)[0]

    with torch.no_grad(), models.evaluating(student), models.exact_attention(student):
        outputs = models.apply(student, here, batch, **wanted)
        # The loss looks at its labels, which vmap forbids, so only the network goes into vmap.
        cotangents = grad(lambda values: loss(values, batch).sum())(outputs)
        return vmap(one, chunk_size=chunk_size)(cotangents, inputs)


def hessian_vector_product(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss,
    vector: Parameters,
    method: Literal["forward-over-reverse", "reverse-over-reverse"] = "forward-over-reverse",
    **wanted: bool,
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
            product = jvp(grad(mean), (here,), (along,))[1]
            return {name: value.detach() for name, value in product.items()}
        leaves = {name: value.requires_grad_() for name, value in here.items()}
        tensors = list(leaves.values())
        first = torch.autograd.grad(mean(leaves), tensors, create_graph=True, materialize_grads=True)
        paired = sum((value * along[name]).sum() for name, value in zip(leaves, first, strict=True))
        return dict(zip(leaves, torch.autograd.grad(paired, tensors, materialize_grads=True), strict=True))


def to_vector(parameters: Parameters) -> Float[Tensor, "weights"]:
    """All tensors, flattened and joined in the order of the dict."""
    return torch.cat([value.flatten() for value in parameters.values()])


def from_vector(vector: Float[Tensor, "weights"], like: Parameters) -> Parameters:
    """The inverse of `to_vector`, with the names and shapes of `like`."""
    pieces = vector.split([value.numel() for value in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}


Product = Callable[[Parameters], Parameters]
"""A matrix, given as what it does to a vector."""


@dataclass(frozen=True)
class Solution:
    """What a solver of (H + λ)x = v found: x, after how many products, and the relative residual ‖v − (H + λ)x‖/‖v‖."""

    vector: Parameters
    iterations: int
    residual: float


def conjugate_gradient(
    product: Product, vector: Parameters, damping: float = 0.0, iterations: int = 100, tolerance: float = 1e-6
) -> Solution:
    """Solve (H + λ)x = v by conjugate gradients, H given by its product with a vector.

    Stops at a relative residual of `tolerance` or after `iterations` products.

    Raises ValueError if H + λ has a direction of curvature ≤ 0 on the way, as the Hessian of a neural network has
    unless the damping λ is large enough.

    Source: Koh and Liang (2017), section 3.  Derived in: chapters/02_influence.
    """
    right = to_vector(vector)
    norm = right.norm().item()
    solution, residual, search = torch.zeros_like(right), right.clone(), right.clone()
    squared, count = residual.dot(residual), 0
    while count < iterations and squared.sqrt().item() > tolerance * norm:
        image = to_vector(product(from_vector(search, vector))) + damping * search
        curvature = search.dot(image)
        if not curvature > 0:
            raise ValueError(
                f"the curvature along a search direction is {(curvature / search.dot(search)).item():.3g} after "
                f"{count} products: the matrix plus damping {damping} is not positive definite; raise the damping"
            )
        step = squared / curvature
        solution = solution + step * search
        residual = residual - step * image
        before, squared = squared, residual.dot(residual)
        search = residual + (squared / before) * search
        count += 1
    return Solution(from_vector(solution, vector), count, squared.sqrt().item() / norm if norm else 0.0)


def lissa(products: Iterable[Product], vector: Parameters, damping: float = 0.0, scale: float = 1.0) -> Solution:
    """Solve (H + λ)x = v by x ← x + (v − (H_t + λ)x)/σ, one product with a Hessian H_t of a mini-batch at a time.

    `products` yields the Hessians, as many as there are steps, so that the caller draws the batches.  `scale` σ must be
    larger than half the largest eigenvalue of every H_t + λ.  The residual is the one seen in the last step, on its
    mini-batch.

    Raises ValueError if the iteration diverges.

    Source: Koh and Liang (2017), section 3, after Agarwal et al. (2017).  Derived in: chapters/02_influence.
    """
    right = to_vector(vector)
    norm = right.norm().item()
    solution, relative, count = torch.zeros_like(right), 1.0, 0
    for count, product in enumerate(products, start=1):
        residual = right - to_vector(product(from_vector(solution, vector))) - damping * solution
        relative = residual.norm().item() / norm if norm else 0.0
        if not relative < 1e6:
            raise ValueError(
                f"the iteration diverges: relative residual {relative:.3g} at step {count} with scale {scale}; "
                "take a larger scale, at least half the largest eigenvalue, and more steps"
            )
        solution = solution + residual / scale
    return Solution(from_vector(solution, vector), count, relative)


def classical_influence(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss,
    inverse_product: Parameters,
    method: TangentMethod = "jvp",
) -> Float[Tensor, "batch"]:
    """−⟨∇ℓ_i, H⁻¹∇L_e⟩: how the feedback loss changes when sample i's weight in the sum of losses grows.

    `inverse_product` is H⁻¹∇L_e, from `conjugate_gradient` or `lissa`.  Leaving sample i out of n changes the feedback
    loss by −1/n of this, to first order.  Mind the sign: a *helpful* sample is negative here and positive in `tracin`
    and `distillation_influence`.

    Source: Koh and Liang (2017), eq. (2).  Derived in: chapters/02_influence.
    """
    return -influence_along(student, parameters, batch, loss, inverse_product, method)


@dataclass(frozen=True)
class Checkpoint:
    """The student at some time of its training, and the learning rate there."""

    parameters: Parameters
    learning_rate: float


def tracin(
    student: nn.Module,
    checkpoints: Iterable[Checkpoint],
    batch: Batch,
    feedback: Batch,
    loss: Loss = task_loss,
    feedback_loss: Loss = task_loss,
    method: TangentMethod = "jvp",
) -> Float[Tensor, "batch"]:
    """Σ_k η_k ⟨∇ℓ_i(θ_k), ∇L_e(θ_k)⟩ over checkpoints: how much sample i has lowered the feedback loss in training.

    Raises ValueError if there is no checkpoint.

    Source: LGTM eq. (12).  Derived in: chapters/02_influence.
    """
    total = None
    for checkpoint in checkpoints:
        direction = feedback_gradient(student, checkpoint.parameters, feedback, feedback_loss)
        influences = influence_along(student, checkpoint.parameters, batch, loss, direction, method)
        total = checkpoint.learning_rate * influences + (0 if total is None else total)
    if total is None:
        raise ValueError("TracIn sums over checkpoints, but there is none")
    return total


def _check_choice(value: str, valid: tuple[str, ...], what: str) -> None:
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"{what} is {value!r}: {hint}expected one of {', '.join(map(repr, valid))}")
