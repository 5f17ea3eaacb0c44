"""Gradients through a sampled choice: REINFORCE, its baselines, and the exact expectation where it can be afforded.

A policy has one row of logits for each choice it makes, `(choices, actions)`; the actions drawn from it and their
rewards have shape `(samples, choices)`.  For Tutor-KD a choice is a masked position and an action a word.

What these functions return is to be made *large*.  Rewards are always constants: no gradient goes through them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def draw_actions(
    logits: Float[Tensor, "choices actions"], samples: int = 1, generator: torch.Generator | None = None
) -> Int[Tensor, "samples choices"]:
    """Independent actions from softmax(logits), `samples` for each choice.

    Raises ValueError for fewer than one sample.

    Source: Tutor-KD eq. (1), the sampling.  Derived in: chapters/08_policy_gradient.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected 1 or more")
    probabilities = F.softmax(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, dim=-1)
    return torch.multinomial(probabilities, samples, replacement=True, generator=generator).T


def log_probability(
    logits: Float[Tensor, "choices actions"], actions: Int[Tensor, "samples choices"]
) -> Float[Tensor, "samples choices"]:
    """log π(action), in nats, for each sample of each choice.

    Raises ValueError if logits and actions differ in the number of choices.

    Source: Tutor-KD eq. (6), the first factor.  Derived in: chapters/08_policy_gradient.
    """
    if actions.shape[-1:] != logits.shape[:1]:
        raise ValueError(
            f"actions have shape {tuple(actions.shape)} and logits {tuple(logits.shape)}: expected (samples, choices) "
            "and (choices, actions), with as many choices"
        )
    return F.log_softmax(logits, dim=-1).gather(-1, actions.T).T


def reinforce(
    logits: Float[Tensor, "choices actions"],
    actions: Int[Tensor, "samples choices"],
    rewards: Float[Tensor, "samples choices"],
    baseline: Tensor | float = 0.0,
) -> Float[Tensor, "choices"]:
    """Mean over the samples of (reward − baseline) · log π(action), one value for each choice.

    Only its gradient means something: it is an unbiased estimate of the gradient of the expected reward, if the
    `baseline` (anything that broadcasts to the rewards) does not depend on the action whose reward it is subtracted
    from.  `running_mean` and `leave_one_out` give such baselines.  Neither rewards nor baseline get a gradient.

    Raises ValueError if actions and rewards differ in shape, and what `log_probability` raises.

    Source: Tutor-KD eq. (6).  Derived in: chapters/08_policy_gradient.
    """
    if rewards.shape != actions.shape:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}, actions {tuple(actions.shape)}: expected (samples, choices) "
            "for both, one reward for each action"
        )
    baseline = baseline.detach() if isinstance(baseline, Tensor) else baseline
    return ((rewards.detach() - baseline) * log_probability(logits, actions)).mean(dim=0)


def expected_reward(
    logits: Float[Tensor, "choices actions"], rewards: Float[Tensor, "choices actions"]
) -> Float[Tensor, "choices"]:
    """Σ over actions of π(action) · reward(action): what `reinforce` estimates, with its exact gradient.

    For few actions, since the reward of every action must be known.  The rewards get no gradient.

    Source: Tutor-KD eqs. (2), (6): the expectation.  Derived in: chapters/08_policy_gradient.
    """
    return (F.softmax(logits, dim=-1) * rewards.detach()).sum(dim=-1)


def leave_one_out(rewards: Float[Tensor, "samples choices"]) -> Float[Tensor, "samples choices"]:
    """For each sample the mean reward of the *other* samples of the same choice: a baseline without bias.

    Raises ValueError for a single sample, which has no others.

    Derived in: chapters/08_policy_gradient.
    """
    samples = len(rewards)
    if samples < 2:
        raise ValueError("leave_one_out needs 2 samples of each choice or more, got 1: draw more, or use running_mean")
    return (rewards.sum(dim=0) - rewards) / (samples - 1)


def running_mean(previous: Tensor | float, rewards: Tensor, decay: float = 0.9) -> Tensor:
    """The baseline for the *next* step: decay · previous + (1 − decay) · mean of this step's rewards, a scalar.

    Using it in the step whose rewards it has seen would bias the gradient.

    Raises ValueError unless 0 ≤ decay < 1.

    Derived in: chapters/08_policy_gradient.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; expected 0 (the last step's rewards only) or more, below 1")
    return decay * previous + (1 - decay) * rewards.detach().mean()
