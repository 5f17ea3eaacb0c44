"""What is imitated: the weighted sum, written out."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from kdlib import losses
from kdlib.methods import KD, ProKT
from kdlib.models import Outputs
from kdlib.settings import checked

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
    imitation = KD(alpha=0.3, pkd_weight=1.7, pkd_layers=layers, pkd_normalisation=normalisation)
    assert imitation.loss(OURS, THEIRS, LABELS).tolist() == pytest.approx(written(0.3, 2.0, 1.7, layer, divisor))


def test_without_weight_hidden_states_are_neither_wanted_nor_looked_at():
    imitation = KD(alpha=0.3)
    assert imitation.wanted == {} and KD(pkd_weight=0.1).wanted == {"hidden_states": True}
    without = imitation.loss(Outputs(OURS.logits), Outputs(THEIRS.logits), LABELS)
    assert without.tolist() == pytest.approx(written(0.3, 2.0, 0.0, 2, 1))


@given(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), st.floats(0.5, 8), st.sampled_from([0.0]) | st.floats(0, 3))
def test_whatever_the_weights_it_is_their_sum(alpha, temperature, weight):
    values = KD(alpha=alpha, temperature=temperature, pkd_weight=weight).loss(OURS, THEIRS, LABELS)
    assert values.tolist() == pytest.approx(written(alpha, temperature, weight, 2, 1), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_agreement_is_the_objective_alone(name):
    """The one who learns comes first, at the imitation's temperature; without labels nothing else is left."""
    chosen = {"temperature": 3.0, "objective": name}
    agreement = KD(alpha=0.9, pkd_weight=5.0, **chosen).agreement(OURS, THEIRS)
    expected = losses.OBJECTIVES[name](OURS.logits, THEIRS.logits, temperature=3.0, reduction="none")
    torch.testing.assert_close(agreement, expected)
    torch.testing.assert_close(KD(alpha=0.0, **chosen).loss(OURS, THEIRS, LABELS), expected)
    assert agreement.shape == (3,)
    mixed = 0.4 * F.cross_entropy(OURS.logits, LABELS, reduction="none") + 0.6 * expected
    torch.testing.assert_close(KD(alpha=0.4, **chosen).loss(OURS, THEIRS, LABELS), mixed)


@pytest.mark.parametrize("name", losses.TEACHER_OBJECTIVES)
def test_a_teacher_imitates_its_student_with_the_roles_exchanged(name):
    """At the student's temperature, with its own α and objective; hidden states are the student's to imitate."""
    mutual = ProKT(alpha=0.1, pkd_weight=5.0, temperature=3.0, teacher_alpha=0.4, teacher_objective=name)
    expected = losses.TEACHER_OBJECTIVES[name](THEIRS.logits, OURS.logits, temperature=3.0, reduction="none")
    mixed = 0.4 * F.cross_entropy(THEIRS.logits, LABELS, reduction="none") + 0.6 * expected
    torch.testing.assert_close(mutual.teachers_loss(Outputs(THEIRS.logits), Outputs(OURS.logits), LABELS), mixed)
    unlabelled = ProKT(temperature=3.0, teacher_alpha=0.0, teacher_objective=name)
    hidden = torch.full_like(LABELS, -7)
    torch.testing.assert_close(unlabelled.teachers_loss(THEIRS, OURS, hidden), expected)


def test_a_teacher_takes_its_students_weight_and_objective_unless_told_otherwise():
    mutual = ProKT(alpha=0.2, objective="logit_mse")
    assert (mutual.teacher_alpha, mutual.teacher_objective) == (0.2, "logit_mse")
    assert mutual.zero_classifiers is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("weight", [0.0, 1.7])
def test_what_is_taught_is_the_loss_without_its_labels_over_its_weight(alpha, weight):
    settings = KD(alpha=alpha, pkd_weight=weight)
    hard = F.cross_entropy(OURS.logits, LABELS, reduction="none")
    expected = (settings.loss(OURS, THEIRS, LABELS) - alpha * hard) / (1 - alpha)
    torch.testing.assert_close(settings.taught(OURS, THEIRS), expected)


def test_without_weight_the_labels_are_not_read():
    hidden = torch.full_like(LABELS, -7)
    KD(alpha=0.0).loss(OURS, THEIRS, hidden)
    with pytest.raises(ValueError, match="label -7"):
        KD(alpha=1e-9).loss(OURS, THEIRS, hidden)


def test_an_imitation_does_not_change():
    """Several methods share one, and defaults are built from it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        KD().alpha = 0.9


def test_the_example_is_not_detached():
    theirs = Outputs(THEIRS.logits.clone().requires_grad_())
    KD(alpha=0.5).loss(OURS, theirs, LABELS).sum().backward()
    assert theirs.logits.grad.abs().sum() > 0


def test_labels_alone_are_the_tasks_loss():
    values = KD(alpha=1.0).loss(OURS, THEIRS, LABELS)
    torch.testing.assert_close(values, F.cross_entropy(OURS.logits, LABELS, reduction="none"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"pkd_weight": -1.0}, "pkd_weight is -1.0"),
        ({"pkd_weight": float("nan")}, "pkd_weight is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"objective": "kd"}, "objective is 'kd'; expected one of kl, reverse_kl"),
        ({"objective": "reverse_soft_cross_entropy"}, "objective is 'reverse_soft_cross_entropy'; expected one of kl"),
        ({"pkd_layers": "first"}, "pkd_layers is 'first'; expected one of skip, last"),
        ({"pkd_normalisation": "max"}, "pkd_normalisation is 'max'; expected one of sum, mean"),
    ],
)
def test_weights_without_meaning_are_refused(settings, message):
    with pytest.raises(ValidationError):
        KD(**settings)
    assert message in checked(KD, settings)[1][0]


def test_defaults_that_depend_on_other_fields():
    assert KD(labelled_course=False).alpha == 0.0 and KD().alpha == 0.5
    assert (KD().pkd_layers, KD().pkd_normalisation) == (None, None)
    patient = KD(pkd_weight=1.0)
    assert (patient.pkd_layers, patient.pkd_normalisation) == ("skip", "sum")
    assert KD(pkd_weight=1.0, pkd_layers="last", pkd_normalisation="mean").pkd_layers == "last"
