"""Online distillation: the teacher learns the task while it teaches, and stays close to its student.

Source: LGTM eqs. (3)-(4), which is ProKT (Shi et al., 2021); mutual learning, DML (Zhang et al., 2018), is the case in
which both do the same.  Derived in: chapters/04_online_distillation.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib import models
from kdlib.imitation import Imitation
from kdlib.learner import Batch, Learner, minimise_together
from kdlib.methods import Step, mean_entropy
from kdlib.models import Outputs

Order = Literal["teacher", "student", "simultaneous"]
ORDERS: tuple[Order, ...] = ("teacher", "student", "simultaneous")


def online_distillation(
    student: Learner,
    teacher: Learner,
    imitation: Imitation,
    teacher_imitation: Imitation,
    first: Order = "teacher",
) -> Step:
    """Teacher and student learn from the labels and from each other, in turns or at once.

    `imitation` is what the student learns from the teacher, `teacher_imitation` what the teacher learns from the
    student: its objective is called with the roles exchanged, so KL means KL(p_s ‖ p_t) there, and
    `losses.reverse_soft_cross_entropy` is LGTM eq. (3) as printed.  With `first="teacher"` the student learns from the
    teacher as it is *after* its step, as eq. (4) has it; with "student" it is the other way round; with "simultaneous"
    both learn from the other as it was.

    One who has to be asked only for its predictions is asked without dropout; in the simultaneous order both networks
    run once, and their predictions of that run are the targets.

    Raises ValueError for another order, and for hidden states in the teacher's imitation.
    """
    if first not in ORDERS:
        raise ValueError(f"first is {first!r}; expected one of {', '.join(ORDERS)}")
    if teacher_imitation.wanted:
        raise ValueError(
            "a teacher imitates its student's predictions only: give pkd_weight to the student's imitation"
        )
    wanted = imitation.wanted

    def update(who: Learner, its_imitation: Imitation, other: Learner, batch: Batch) -> tuple[float, Tensor]:
        """One step of `who`, learning from `other` as it is; also the logits that `who` had."""
        seen: list[Tensor] = []

        def loss(piece: Batch) -> Tensor:
            example = models.targets(other.module, piece, **its_imitation.wanted)
            own = models.outputs(who.module, piece, **its_imitation.wanted)
            seen.append(own.logits.detach())
            return its_imitation(own, example, piece["labels"])

        return who.minimise(loss, batch), torch.cat(seen)

    def in_turns(batch: Batch) -> dict[str, float]:
        turns = [(teacher, teacher_imitation, student), (student, imitation, teacher)]
        if first == "student":
            turns.reverse()
        done = {turn[0].name: update(*turn, batch) for turn in turns}
        return _summary(*done[student.name], *done[teacher.name])

    def at_once(batch: Batch) -> dict[str, float]:
        seen: list[tuple[Tensor, Tensor]] = []

        def losses(piece: Batch) -> list[Tensor]:
            ours, theirs = (models.outputs(who.module, piece, **wanted) for who in (student, teacher))
            seen.append((ours.logits.detach(), theirs.logits.detach()))
            return [
                imitation(ours, detached(theirs), piece["labels"]),
                teacher_imitation(theirs, detached(ours), piece["labels"]),
            ]

        loss, teacher_loss = minimise_together([student, teacher], losses, batch)
        ours, theirs = (torch.cat(logits) for logits in zip(*seen, strict=True))
        return _summary(loss, ours, teacher_loss, theirs)

    return at_once if first == "simultaneous" else in_turns


def _summary(loss: float, logits: Tensor, teacher_loss: float, teacher_logits: Tensor) -> dict[str, float]:
    """The numbers to log of one step of two learners: losses, and the entropies of their predictions in nats."""
    return {
        "loss": loss,
        "teacher_loss": teacher_loss,
        "student_entropy": mean_entropy(logits),
        "teacher_entropy": mean_entropy(teacher_logits),
    }


def detached(outputs: Outputs) -> Outputs:
    """The same numbers, as constants."""
    return Outputs(outputs.logits.detach(), tuple(states.detach() for states in outputs.hidden_states))


def zero_classifier(module: PreTrainedModel) -> None:
    """Set the classification head to zero, so that the network starts with equal probabilities for all classes.

    Two networks that start so agree at first, whatever they are.  Raises what `models.output_layer` raises.

    Source: LGTM Figure 5, the one-stage setting, after ProKT.  Derived in: chapters/04_online_distillation.
    """
    head = models.output_layer(module)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
