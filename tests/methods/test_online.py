"""A round of online distillation against the same round in plain torch, in all three orders; and zero classifiers."""

import pytest
import torch
from torch.nn import functional as F

from kdlib import losses, methods, models
from kdlib.imitation import Imitation
from kdlib.methods import online
from tests import exact, pairs

ALPHA, TEACHER_ALPHA = 0.3, 0.6
OBJECTIVES = {"kl": losses.kl_divergence, "printed": losses.reverse_soft_cross_entropy}


def loss_by_hand(own, other, labels, alpha, printed=False):
    """Labels and the other network, from torch's own functions; `printed`: the second term of LGTM eq. (3)."""
    log_p, log_q = own.log_softmax(-1), other.detach().log_softmax(-1)
    term = -(log_p.exp() * log_q).sum(-1).mean() if printed else F.kl_div(log_p, log_q.exp(), reduction="batchmean")
    return alpha * F.cross_entropy(own, labels) + (1 - alpha) * term


def round_by_hand(student, teacher, batch, first, printed):
    """LGTM eq. (4), and the other two orders."""
    before = {who: who.answers(batch).logits.detach() for who in (student, teacher)}
    turns = [(teacher, student, TEACHER_ALPHA, printed), (student, teacher, ALPHA, False)]
    for own, other, alpha, as_printed in turns[::-1] if first == "student" else turns:
        example = before[other] if first == "simultaneous" else other.answers(batch).logits
        own.descend(loss_by_hand(own.answers(batch).logits, example, batch["labels"], alpha, as_printed))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("first", online.ORDERS)
def test_rounds_are_those_of_plain_torch(first, objective):
    student, teacher = pairs.pair()
    plain = [pairs.Plain(who) for who in (student, teacher)]
    imitations = Imitation(ALPHA), Imitation(TEACHER_ALPHA, objective=OBJECTIVES[objective])
    step = online.online_distillation(student, teacher, *imitations, first)
    step(exact.batch(6, 0))
    round_by_hand(*plain, exact.batch(6, 0), first, objective == "printed")
    for who, theirs in zip((student, teacher), plain, strict=True):
        assert pairs.difference(who, theirs) < 1e-8


def test_the_orders_differ():
    ends = []
    for first in online.ORDERS:
        student, teacher = pairs.pair()
        online.online_distillation(student, teacher, Imitation(ALPHA), Imitation(ALPHA), first)(exact.batch(6, 0))
        ends.append((pairs.weights(student), pairs.weights(teacher)))
    (student_t, teacher_t), (student_s, teacher_s), (student_both, teacher_both) = ends
    assert not pairs.same(student_t, student_both) and not pairs.same(teacher_s, teacher_both)
    assert pairs.same(teacher_t, teacher_both) and pairs.same(student_s, student_both)  # who moves first sees no change


def test_the_entropies_are_logged():
    student, teacher = pairs.pair()
    batch = exact.batch(6, 0)
    entropies = [torch.distributions.Categorical(logits=models.logits(w.module, batch)) for w in (student, teacher)]
    values = online.online_distillation(student, teacher, Imitation(), Imitation(), "simultaneous")(batch)
    for name, wanted in zip(("student_entropy", "teacher_entropy"), entropies, strict=True):
        assert values[name] == pytest.approx(wanted.entropy().mean().item(), rel=1e-5)
    assert methods.entropy(torch.zeros(4, 3)) == pytest.approx(torch.tensor(3.0).log().item())


def test_a_zero_classifier_knows_nothing():
    network = exact.bert()
    online.zero_classifier(network)
    assert not models.logits(network, exact.batch(6, 0)).any()
    with pytest.raises(ValueError, match="no linear layer called classifier"):
        online.zero_classifier(network.bert)


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="first is 'both'; expected one of teacher, student, simultaneous"):
        online.online_distillation(*pairs.pair(), Imitation(), Imitation(), "both")
