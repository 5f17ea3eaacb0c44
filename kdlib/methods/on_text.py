"""What the methods on plain text share: their settings, their student, and what takes part in a step.

A student is distilled from a masked language model without labels, and fine-tuned on a task later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdlib import losses, models
from kdlib.learner import Batch, Learner
from kdlib.methods.base import Method, Step
from kdlib.settings import settings

TextLoss = Callable[[Batch], Tensor]
"""One value for each sentence of a batch, whose mean is the loss."""


class Student(nn.Module):
    """A student with what it needs to be taught, and later leaves behind: a score for each word, and W of eq. (12).

    Derived in: chapters/09_tutor_kd.
    """

    def __init__(self, network: PreTrainedModel, teacher_width: int, seed: int = 0):
        super().__init__()
        width = network.config.hidden_size
        self.network = network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.score, self.projection = nn.Linear(width, 1), nn.Linear(width, teacher_width, bias=False)

    def projected(self, states: Float[Tensor, "*positions hidden"]) -> Float[Tensor, "*positions teachers_hidden"]:
        """H^S W."""
        return self.projection(states)

    def scores(self, states: Float[Tensor, "*positions hidden"]) -> Float[Tensor, "*positions"]:
        """What `modified_prediction` and `modified_loss` take, in float32 at least."""
        return losses.full_precision(self.score(states).squeeze(-1))


@dataclass(frozen=True)
class TextCast:
    """Who takes part in a run on text: the student, its teacher (None for mlm), its tutor (for tutor only).

    The student's module is a `Student` if there is a teacher, else the network itself.  `special` and `mask` are ids of
    words, see `corpus.Masking`.
    """

    student: Learner
    teacher: PreTrainedModel | None
    tutor: Learner | None
    special: tuple[int, ...]
    mask: int

    @property
    def pair(self) -> tuple[Student, PreTrainedModel]:
        """The student's module and the teacher."""
        assert isinstance(self.student.module, Student) and self.teacher is not None
        return self.student.module, self.teacher


@runtime_checkable
class TextRun(Protocol):
    """What a method may ask of the run that it is part of."""

    @property
    def method(self) -> str:
        """Its name."""
        ...

    @property
    def teacher(self) -> str | None:
        """The network that teaches."""
        ...

    @property
    def student(self) -> str | None:
        """The network that learns."""
        ...


@settings
class OnText(Method):
    """What a run asks of the settings of a method on text."""

    ignores: ClassVar[tuple[str, ...]] = ()
    """Fields of all runs that this method does not read."""
    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "fixed"

    @property
    def trains_head(self) -> bool:
        """Whether it leaves a student with a trained masked-language-model head."""
        return False

    @property
    def pairs_layers(self) -> bool:
        """Whether the student's layers imitate the teacher's."""
        return False

    def loss(self, cast: TextCast) -> TextLoss:
        """What the student minimises, unless there is more than that."""
        raise TypeError(f"{type(self).__name__} has no loss: a method says what its student minimises")

    def step(self, cast: TextCast) -> Step:
        """What a run does with each batch."""
        loss = self.loss(cast)
        return lambda batch: {"loss": cast.student.minimise(loss, batch)}

    def measure(self, cast: TextCast) -> Callable[[Batch], dict[str, float]]:
        """What the method minimises, as numbers, on a batch of held-out text."""
        loss = self.loss(cast)
        return lambda batch: {"loss": loss(batch).mean().item()}

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Raise ValueError for networks that cannot be compared as the method compares them."""


@settings
class AskingForWords(OnText):
    """For a method that asks the teacher for words, not only for what is inside it."""

    silent: ClassVar[dict[str, Any]] = {"untrained_teacher": False}

    untrained_teacher: bool = False
    """True: a teacher whose masked-language-model head was never trained may be asked for words all the same; it is
    refused otherwise"""

    def problems(self, run: TextRun) -> list[str]:
        found = super().problems(run)
        fresh = run.teacher == models.MINILM or models.is_fresh(run.teacher or models.BOOK_MASKED)
        return [*found, untrained(run.teacher, run.method)] if fresh and not self.untrained_teacher else found


def untrained(teacher: str | None, method: str) -> str:
    """What is wrong with a teacher whose head is new."""
    return (
        f"teacher {teacher!r} comes without a trained masked-language-model head, and {method} asks it "
        "for words: train it first (method 'mlm' with it as the student) and give teacher the folder of that student "
        "(untrained_teacher=True takes it as it is)"
    )


@settings
class ComparingAttention(OnText):
    """For a method that can compare attention head by head."""

    attention: bool | None = None
    """imitate attention too; None: where the numbers of heads agree"""

    @property
    def pairs_layers(self) -> bool:
        return True

    def compares(self, student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
        """Whether attention is compared for these networks."""
        agree = student.config.num_attention_heads == teacher.config.num_attention_heads
        return agree if self.attention is None else self.attention

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        if self.compares(student, teacher):
            check_heads(student.config, teacher.config, "leave attention out")


def check_heads(student: PretrainedConfig, teacher: PretrainedConfig, remedy: str) -> None:
    """Raise ValueError unless both have the same number of heads."""
    heads, theirs = (one.num_attention_heads for one in (student, teacher))
    if heads != theirs:
        raise ValueError(
            f"the student has {heads} heads, the teacher {theirs}, and attention is compared head by head: {remedy}"
        )


def depth(network: PreTrainedModel) -> int:
    """The number of encoder layers."""
    return network.config.num_hidden_layers
