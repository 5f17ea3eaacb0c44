"""BERT-of-Theseus: the teacher's layers are replaced, one block after the other, until the student is left.

Source: BERT-of-Theseus (Xu et al., 2020), a rival in MetaDistil Table 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdlib import losses, models
from kdlib.learner import Batch
from kdlib.methods.base import Cast, Run, Step, Trained
from kdlib.settings import Share, settings

SAME = (
    "model_type",
    "hidden_size",
    "embedding_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "vocab_size",
    "hidden_act",
)
"""What of a configuration must be equal for one network's weights to fit into the other."""


@settings
class Theseus(Trained):
    """The student's layers take the place of the teacher's at random, more and more of them."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "fixed"
    asks: ClassVar[Literal["answers", "network", "route"]] = "network"

    replacing_rate: Share = 0.3
    """the probability at first that a block is the student's"""
    replaced_after: Share = 0.5
    """share of the steps after which all blocks are, a choice of this book"""
    replacement: Literal["linear", "constant"] = "linear"
    """until then the probability grows, "linear", or stays, "constant\""""

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if run.student not in (None, run.teacher) and not models.is_fresh(run.student or ""):
            found.append(
                f"student is {run.student!r}, whose weights theseus would not use, for its student begins as the "
                "teacher's first layers: give student_layers instead"
            )
        return found

    def check_shapes(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        depth, blocks = teacher.num_hidden_layers, student.num_hidden_layers
        unlike = [name for name in SAME if getattr(student, name, None) != getattr(teacher, name, None)]
        if depth % blocks or unlike:
            differ = f"; they differ in {', '.join(unlike)}" if unlike else ""
            raise ValueError(
                f"theseus replaces blocks of the teacher's {depth} layers of {teacher.hidden_size} units by one layer "
                f"each, and the student has {blocks} of {student.hidden_size}{differ}: take a student that is the "
                "teacher but for its depth (student_layers), which divides the teacher's"
            )

    def prepare(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> None:
        succeed(student, teacher)

    def release(self, student: PreTrainedModel) -> None:
        student.requires_grad_(True)

    def step(self, cast: Cast) -> Step:
        return theseus(cast, self)

    def probability(self, taken: int, total: int) -> float:
        """That a block is the student's, after so many of all steps."""
        end = self.replaced_after * total
        if taken >= end:
            return 1.0
        return self.replacing_rate + (1 - self.replacing_rate) * taken / end * (self.replacement == "linear")


def succeed(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Give a student the teacher's weights: embeddings, first layers, pooler and head; only the layers learn."""
    theirs = teacher.state_dict()
    student.load_state_dict({name: theirs[name] for name in student.state_dict()})
    student.requires_grad_(False)
    models.encoder_layers(student).requires_grad_(True)


def theseus(cast: Cast, settings: Theseus) -> Step:
    """The task's loss of a network of which each block is the student's layer or, by chance, the teacher's layers.

    The teacher's layers are fixed, with dropout, as the released code has them.  Whether a block is replaced is drawn
    once a step, from the seed and the number of the step.
    """
    student, teacher = cast.student, cast.network
    assert teacher is not None
    teacher.requires_grad_(False).train()
    ours, theirs = models.encoder_layers(student.module), models.encoder_layers(teacher)
    size = len(theirs) // len(ours)

    def step(batch: Batch) -> dict[str, float]:
        rate = settings.probability(student.taken, cast.total)
        chance = torch.Generator().manual_seed(1_000_003 * cast.seed + 250_000 + student.taken)
        drawn = (torch.rand(len(ours), generator=chance) < rate).tolist()
        layers: list[nn.Module] = []
        for block, replaced in enumerate(drawn):
            layers += [ours[block]] if replaced else theirs[size * block : size * (block + 1)]

        def loss(piece: Batch) -> Tensor:
            with _made_of(student.module, layers):
                values = losses.task_loss(models.logits(student.module, piece), piece["labels"], "none")
            # A layer that was not drawn has a gradient of zero, not none: its moments go on, as in the released code.
            return values + 0.0 * sum(weights.sum() for weights in ours.parameters())

        return {"loss": student.minimise(loss, batch), "replaced": sum(drawn) / len(drawn)}

    return step


@contextmanager
def _made_of(network: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the `with` block the encoder of `network` has these layers."""
    encoder, own = network.base_model.encoder, models.encoder_layers(network)
    encoder.layer = nn.ModuleList(layers)
    try:
        yield
    finally:
        encoder.layer = own
