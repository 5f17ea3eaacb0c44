"""The classical answers to which sample helps: gradients one by one, influence functions, TracIn.

For one step of training `kdlib.tangent` has what is needed.  Influence functions ask what the whole training would have
made of other data, so they put the inverse of a Hessian between the two gradients; TracIn adds up over checkpoints.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from kdlib import models, pilot
from kdlib.models import Outputs, Parameters, WantedOutputs
from kdlib.pilot import Loss, task_loss
from kdlib.tangent import Batch, TangentMethod, feedback_gradient, influence_along


def per_sample_gradients(
    student: nn.Module,
    parameters: Parameters,
    batch: Batch,
    loss: Loss = task_loss,
    method: Literal["loop", "vmap"] = "loop",
    chunk_size: int | None = None,
    **wanted: Unpack[WantedOutputs],
) -> Parameters:
    """∇ℓ_i for every sample i: by name, `(batch, *shape of the parameter)`.  Needs batch × parameters of memory.

    "loop" takes the samples one by one; "vmap" computes them together, `chunk_size` at a time.

    Raises ValueError for an unknown method; also what `models.apply` and the loss raise.

    Derived in: chapters/02_influence.
    """
    if method not in ("loop", "vmap"):
        raise ValueError(f"method is {method!r}; expected 'loop' or 'vmap'")
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
