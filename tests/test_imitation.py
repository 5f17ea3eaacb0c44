"""What is imitated: the weighted sum, written out."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kdlib.imitation import Imitation
from torch.nn import functional as F

from kdlib import losses
from kdlib.models import Outputs

LABELS = torch.tensor([2, 0, 1])


def outputs(depth: int, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits, *states = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes(depth))
    return Outputs(logits, tuple(states))


def shapes(depth: int) -> list[tuple[int, ...]]:
    return [(3, 3), *[(3, 5, 4)] * (depth + 1)]


OURS, THEIRS = outputs(2, 0), outputs(4, 1)


def written(alpha: float, temperature: float, weight: float, layer: int, divisor: int) -> list[float]:
    values = []
    for i, label in enumerate(LABELS):
        p_s, p_t = ((z.logits[i] / temperature).softmax(-1) for z in (OURS, THEIRS))
        value = -alpha * OURS.logits[i].softmax(-1)[label].log()
        value += (1 - alpha) * temperature**2 * sum(p * (p / q).log() for p, q in zip(p_t, p_s, strict=True))
        a, b = OURS.hidden_states[1][i, 0], THEIRS.hidden_states[layer][i, 0]
        value += weight * (a / a.norm() - b / b.norm()).square().sum() / divisor
        values.append(value.item())
    return values


@pytest.mark.parametrize(("layers", "layer"), [("skip", 2), ("last", 3)])
@pytest.mark.parametrize(("normalisation", "divisor"), [("sum", 1), ("mean", 4)])
def test_value_is_the_sum_of_three_terms_by_sample(layers, layer, normalisation, divisor):
    """Catches α on the wrong term, a forgotten T², β scaled by 1 − α, and settings that are not passed on."""
    imitation = Imitation(0.3, 2.0, losses.kl_divergence, 1.7, layers, normalisation)
    assert imitation(OURS, THEIRS, LABELS).tolist() == pytest.approx(written(0.3, 2.0, 1.7, layer, divisor))


def test_without_weight_hidden_states_are_neither_wanted_nor_looked_at():
    imitation = Imitation(0.3, 2.0)
    assert imitation.wanted == {} and Imitation(pkd_weight=0.1).wanted == {"hidden_states": True}
    without = imitation(Outputs(OURS.logits), Outputs(THEIRS.logits), LABELS)
    assert without.tolist() == pytest.approx(written(0.3, 2.0, 0.0, 2, 1))


@given(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), st.floats(0.5, 8), st.sampled_from([0.0]) | st.floats(0, 3))
def test_whatever_the_weights_it_is_their_sum(alpha, temperature, weight):
    values = Imitation(alpha, temperature, pkd_weight=weight)(OURS, THEIRS, LABELS)
    assert values.tolist() == pytest.approx(written(alpha, temperature, weight, 2, 1), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objective", losses.TEACHER_OBJECTIVES.values(), ids=losses.TEACHER_OBJECTIVES)
def test_agreement_is_the_objective_alone(objective):
    """The one who learns comes first, at the imitation's temperature; without labels nothing else is left."""
    agreement = Imitation(0.9, 3.0, objective, pkd_weight=5.0).agreement(OURS, THEIRS)
    expected = objective(OURS.logits, THEIRS.logits, temperature=3.0, reduction="none")
    torch.testing.assert_close(agreement, expected)
    torch.testing.assert_close(Imitation(0.0, 3.0, objective)(OURS, THEIRS, LABELS), expected)
    assert agreement.shape == (3,)
    mixed = 0.4 * F.cross_entropy(OURS.logits, LABELS, reduction="none") + 0.6 * expected
    torch.testing.assert_close(Imitation(0.4, 3.0, objective)(OURS, THEIRS, LABELS), mixed)


def test_without_weight_the_labels_are_not_read():
    hidden = torch.full_like(LABELS, -7)
    Imitation(0.0)(OURS, THEIRS, hidden)
    with pytest.raises(ValueError, match="label -7"):
        Imitation(1e-9)(OURS, THEIRS, hidden)


def test_an_imitation_does_not_change():
    """Several methods share one, and defaults are built from it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Imitation().alpha = 0.9


def test_the_example_is_not_detached():
    theirs = Outputs(THEIRS.logits.clone().requires_grad_())
    Imitation(0.5)(OURS, theirs, LABELS).sum().backward()
    assert theirs.logits.grad.abs().sum() > 0


def test_labels_alone_are_the_tasks_loss():
    values = Imitation(alpha=1.0)(OURS, THEIRS, LABELS)
    torch.testing.assert_close(values, F.cross_entropy(OURS.logits, LABELS, reduction="none"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"pkd_weight": -1.0}, "pkd_weight is -1.0"),
        ({"pkd_weight": float("nan")}, "pkd_weight is nan"),
    ],
)
def test_weights_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Imitation(**settings)
