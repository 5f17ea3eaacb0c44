"""What the methods share: the parts of their settings, and what a step is.

A method is a settings class beside the function that makes its `Step`.  The parts say, independently of each other,
what the student imitates (`Imitating`), how the teacher changes (`Learning`, `Mutual`), and what is asked of a pilot
copy of the student (`Piloting`, `Feedback`); a method's class is put together from them and adds what is its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from kdlib import glue, losses, models, representations
from kdlib.learner import BATCH_SIZE, WARMUP_RATIO, WEIGHT_DECAY, Batch, Learner, stage_ends
from kdlib.losses import Objective
from kdlib.models import Outputs, WantedStates
from kdlib.settings import (
    InnerShare,
    Number,
    Positive,
    Rate,
    Seed,
    Share,
    Size,
    Steps,
    Temperature,
    Weight,
    among,
    by_rule,
    fill,
    settings,
)
from kdlib.tangent import TangentMethod

Step = Callable[..., dict[str, float]]
"""A function of one batch, and of a feedback batch where the method asks for one, that updates the learners and returns
numbers to log, "loss" among them."""
PilotRule = Literal["sgd", "adamw"]
PRETRAINED_RATES = {models.MINILM: (1e-4, 2e-4)}
"""Learning rates of a teacher and a student: those of the papers suit BERT's 768 units, a network half as wide needs
larger ones.  Chosen on sentences held out of the training sets of SST-2 and STS-B."""


def suitable_rates(network: str) -> tuple[float, float]:
    """The learning rates of `network` as a teacher and as a student."""
    return (1e-3, 2e-3) if models.is_tiny(network) else PRETRAINED_RATES.get(network, (3e-5, 5e-5))


@runtime_checkable
class Run(Protocol):
    """What a method may ask of the run that it is part of."""

    @property
    def method(self) -> str: ...
    @property
    def teacher(self) -> str | None: ...
    @property
    def student(self) -> str | None: ...
    @property
    def epochs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def micro_batches(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def feedback_fraction(self) -> float | None: ...
    @property
    def glue_task(self) -> glue.Task: ...


@dataclass(frozen=True)
class Cast:
    """Who takes part in a run, and what a step is made of.

    `teacher` is there if it learns.  Of one that is fixed there is what the method asks for (`Taught.asks`): `answers`,
    its outputs for a batch, looked up or computed on the spot; its `network`; or `route`, the answers of its anchors,
    the first one first.  `held_out(rows)` is the beginning of the validation split as one batch.
    """

    student: Learner
    teacher: Learner | None = None
    answers: Callable[[Batch], Outputs] | None = None
    held_out: Callable[[int], Batch] | None = None
    network: PreTrainedModel | None = None
    route: Sequence[Callable[[Batch], Outputs]] = ()
    total: int = 0
    """steps of the whole training"""
    seed: int = 0
    """of the student"""

    @property
    def pair(self) -> tuple[Learner, Learner]:
        """The student and its teacher that learns."""
        assert self.teacher is not None
        return self.student, self.teacher


@settings
class Method:
    """What a run asks of the settings of any method."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "nobody"
    silent: ClassVar[Mapping[str, Any]] = {}
    """Values of this class's fields that add nothing to a run's name: they came after the first records were made."""

    @classmethod
    def defaults(cls, run: Any) -> dict[str, Any]:
        """The defaults that depend on the rest of the run, of fields that were not given."""
        return {}

    def completed(self, run: Any) -> dict[str, Any]:
        """Values for fields that are None still, which depend on others of this object, too."""
        return {}

    def problems(self, run: Any) -> list[str]:
        """What does not go together with the rest of the run, a sentence each."""
        return []

    @property
    def flat(self) -> dict[str, Any]:
        """All fields, None for those that add nothing to a run's name."""
        silent = {n: value for kind in type(self).__mro__ for n, value in vars(kind).get("silent", {}).items()}
        for field in dataclasses.fields(type(self)):
            if field.name in TEACHERS_OWN and field.name not in NAMED_ALWAYS:
                silent[field.name] = field.default
        return {n: None if n in silent and value == silent[n] else value for n, value in vars(self).items()}

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, but for those of the teacher's own run."""
        own = {n: value for n, value in self.flat.items() if n not in TEACHERS_OWN or n in NAMED_ALWAYS}
        return {n: value for n, value in own.items() if value is not None}

    @property
    def networks(self) -> list[str]:
        """Networks that the method names besides teacher and student, or numbers of the teacher's layers."""
        return []

    @property
    def feedback(self) -> str | None:
        """The split that the second batch of a step comes from, "validation" for the first evaluation split."""
        return None

    @property
    def carves(self) -> bool:
        """Whether it needs rows that nobody trains on."""
        return self.feedback == "feedback"

    @property
    def stages(self) -> tuple[float, ...]:
        """The parts of the training, as shares of its steps: in each the learning rate rises and falls once."""
        return (1.0,)

    def unfinished(self, total: int) -> int:
        """Up to which of all steps no student can be chosen: it is in a stage before the last one."""
        return stage_ends(self.stages, total)[-2] if len(self.stages) > 1 else 0

    def check_steps(self, total: int) -> None:
        """Raise ValueError for a training that is too short for what the method does, before the teacher is made."""

    def check_shapes(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        """Raise ValueError for a pair of networks that the method cannot teach with, before the teacher is made."""

    def prepare(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> None:
        """What happens to the networks before they become learners; whatever is drawn is drawn from `seed`."""

    def release(self, student: PreTrainedModel) -> None:
        """What happens to the student after its training, before it is saved: what was only for learning goes."""

    def step(self, cast: Any) -> Step:
        """What a run does with each batch."""
        raise TypeError(f"{type(self).__name__} has no step: a method says what a run does with each batch")


@settings
class Unlabelled(Method):
    """For a method that can do without labels."""

    silent: ClassVar[Mapping[str, Any]] = {"labelled_course": True}

    labelled_course: bool = True
    """False: only the feedback split has labels; fine-tuning takes it, and a student that has a teacher sees the other
    rows without"""

    @property
    def carves(self) -> bool:
        return not self.labelled_course or super().carves

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if self.carves and run.feedback_fraction == 0:
            found.append("feedback_fraction is 0, but labels or exams come from there; leave it out, or give 0.1")
        return found


@settings
class Taught(Method):
    """How the teacher is fine-tuned before it teaches, in a run of its own that other students can share.

    It reads the rows, the longest text, the precision and the largest number of steps of the student's run; everything
    else is its own, so that another student, or another way to train it, does not fine-tune another teacher.
    """

    starts_untrained: ClassVar[bool] = False
    """Whether its teacher may learn the task while it teaches."""
    asks: ClassVar[Literal["answers", "network", "route"]] = "answers"
    """What a fixed teacher is asked for, see `Cast`."""

    teacher_epochs: Number = by_rule()
    """epochs of fine-tuning before the teacher teaches; 0: take it as it is, fine-tuned elsewhere or not at all;
    None: 0 for prokt, dml and lgtm, else 12 if tiny, else as the student's"""
    teacher_learning_rate: Rate = by_rule()
    """of the teacher's fine-tuning; None: 1e-3 for tiny networks, 1e-4 for minilm, 3e-5 for other pretrained ones"""
    teacher_batch_size: Size = BATCH_SIZE
    """of the teacher's fine-tuning, whatever the student's is"""
    teacher_micro_batches: Size = 1
    """of the teacher's fine-tuning: cut each batch into so many pieces to save memory"""
    teacher_weight_decay: Weight = WEIGHT_DECAY
    """of the teacher's fine-tuning"""
    teacher_warmup_ratio: Share = WARMUP_RATIO
    """of the teacher's fine-tuning"""
    teacher_max_grad_norm: Positive | None = None
    """of the teacher's fine-tuning: longer gradients are scaled down; None: 1"""
    teacher_evaluate_every: Steps | None = None
    """of the teacher's fine-tuning: steps between evaluations, of which the best is kept; None: an epoch"""
    teacher_seed: Seed = 0
    """of the teacher: a new head's weights, and order of the data and dropout of its fine-tuning"""

    @classmethod
    def defaults(cls, run: Run) -> dict[str, Any]:
        teacher = run.teacher or ""
        ready = teacher == models.BOOK_TEACHER or cls.starts_untrained
        return {
            **super().defaults(run),
            "teacher_epochs": 0 if ready else 12 if models.is_tiny(teacher) else run.epochs,
            "teacher_learning_rate": suitable_rates(teacher)[0],
        }

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        for field in dataclasses.fields(Taught):
            value = getattr(self, field.name)
            if self.teacher_epochs == 0 and field.name not in NAMED_ALWAYS and value != field.default:
                found.append(f"{field.name} is {value!r}, but teacher_epochs is 0: the teacher is taken as it is")
        return found

    def teachers_run(self, run: Run) -> dict[str, Any] | None:
        """The parameters of the run that makes the teacher, but for what both runs share; None: it is there already.

        The teacher of a method may be any run: a method may give another one here.
        """
        if self.teacher_epochs == 0:
            return None
        own = {name: getattr(self, f"teacher_{name}") for name in TRAINING}
        return {"method": "fine_tune", "student": run.teacher, "predict_test": False, **own}

    @property
    def wanted(self) -> WantedStates:
        """What the networks must answer besides logits, as arguments of `models.outputs` and `models.apply`."""
        return {}

    @property
    def compares_samples(self) -> bool:
        """Whether a batch cannot be cut into pieces."""
        return False


TRAINING = tuple(name.removeprefix("teacher_") for name in Taught.__annotations__ if name.startswith("teacher_"))
"""What the two runs have each for itself, by the names that they have in a run."""
TEACHERS_OWN = tuple(f"teacher_{name}" for name in TRAINING)
NAMED_ALWAYS = ("teacher_epochs", "teacher_learning_rate", "teacher_seed")
"""Those that were there when the first records were made: the others count where they differ from the student's."""


@settings
class Imitating(Taught):
    """What every student that has a teacher imitates.

    α · task loss + (1 − α) · objective at temperature T + β · PKD, one value per sample.

    Source: LGTM eq. (1), MetaDistil eq. (1), IKD eq. (4).  Derived in: chapters/01_distillation.
    """

    silent: ClassVar[Mapping[str, Any]] = {"pkd_weight": 0.0}
    has_one_objective: ClassVar[bool] = False
    """Whether the method is its objective, so that none can be chosen."""

    alpha: Share = by_rule()
    """weight of the hard labels, 1 − α that of the teacher; None: 0.5, without labels 0"""
    temperature: Temperature = 2.0
    """softens teacher and student"""
    objective: Annotated[str, among(losses.OBJECTIVES)] = "kl"
    """what the student imitates; None: "kl", for regression "logit_mse\""""
    pkd_weight: Weight = 0.0
    """weight of PKD's term on hidden states, on top of the others, which are not looked at while it is 0"""
    pkd_layers: Literal["skip", "last"] | None = None
    """the teacher's layers for it: "skip" (every so many) or "last"; None: "skip\""""
    pkd_normalisation: Literal["sum", "mean"] | None = None
    """"sum" over layers and units, as PKD, or their "mean", as MetaDistil's code; None: "sum\""""

    def __post_init__(self) -> None:
        fill(self, alpha=0.5 if getattr(self, "labelled_course", True) else 0.0)
        if self.pkd_weight:
            fill(self, pkd_layers="skip", pkd_normalisation="sum")

    @classmethod
    def defaults(cls, run: Run) -> dict[str, Any]:
        regression = {"objective": "logit_mse"} if run.glue_task.is_regression and not cls.has_one_objective else {}
        return {**super().defaults(run), **regression}

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        both = ("objective", "teacher_objective")
        for name in [name for name in both if getattr(self, name, None) == "spherical"]:
            if run.glue_task.num_labels != 2:
                continue
            found.append(
                f"{name} is 'spherical', but {run.glue_task.name} has two classes, whose logits have one direction "
                "and its opposite: it has no gradient there. Take another objective, or a task of three classes"
            )
        for name in both if run.glue_task.is_regression else ():
            if getattr(self, name, "logit_mse") not in losses.REGRESSION_OBJECTIVES:
                expected = ", ".join(losses.REGRESSION_OBJECTIVES)
                found.append(
                    f"{name} is {getattr(self, name)!r}, but {run.glue_task.name} is a regression task, where a "
                    f"softmax has no meaning; "
                    + ("take method kd" if self.has_one_objective else f"expected {expected}")
                )
        if self.compares_samples and run.micro_batches > 1:
            found.append(
                f"micro_batches is {run.micro_batches}: {losses.BATCH_OBJECTIVES[0]!r} compares the samples of a whole "
                "batch; take 1 and a smaller batch_size"
            )
        for name in ("pkd_layers", "pkd_normalisation"):
            if not self.pkd_weight and getattr(self, name) is not None:
                found.append(f"{name} is {getattr(self, name)!r}, but pkd_weight is 0, which leaves PKD out")
        if not getattr(self, "labelled_course", True) and self.alpha != 0:
            found.append(f"alpha is {self.alpha}, a weight for the labels of a course that has none; expected 0")
        return found

    def check_shapes(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        super().check_shapes(student, teacher)
        if self.pkd_weight:
            depths = student.num_hidden_layers, teacher.num_hidden_layers
            representations.patient_layers(*depths, self.pkd_layers or "skip")
            representations.check_patient_widths(student.hidden_size, teacher.hidden_size)

    @property
    def compares_samples(self) -> bool:
        return self.objective in losses.BATCH_OBJECTIVES

    @property
    def wanted(self) -> WantedStates:
        return {"hidden_states": True} if self.pkd_weight > 0 else {}

    def loss(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Float[Tensor, "batch"]:
        """The loss of every sample for the student's outputs, given the teacher's.  With α = 0 no label is read."""
        objective = losses.OBJECTIVES[self.objective]
        value = _mixture(student, teacher, labels, self.alpha, self.temperature, objective)
        return value + self.pkd_weight * self.states(student, teacher) if self.pkd_weight else value

    def taught(self, student: Outputs, teacher: Outputs) -> Float[Tensor, "batch"]:
        """What in the loss depends on the teacher, over its weight 1 − α."""
        value = self.agreement(student, teacher)
        weight = self.pkd_weight / (1 - self.alpha) if self.pkd_weight else 0.0
        return value + weight * self.states(student, teacher) if weight else value

    def agreement(self, student: Outputs, teacher: Outputs) -> Float[Tensor, "batch"]:
        """The objective alone: how far the student is from its teacher, by sample."""
        objective = losses.OBJECTIVES[self.objective]
        return objective(student.logits, teacher.logits, temperature=self.temperature, reduction="none")

    def states(self, student: Outputs, teacher: Outputs) -> Float[Tensor, "batch"]:
        """PKD's term, by sample."""
        layers, normalisation = self.pkd_layers or "skip", self.pkd_normalisation or "sum"
        return representations.patient(
            student.hidden_states, teacher.hidden_states, layers, normalisation, reduction="none"
        )


def _mixture(
    learner: Outputs, example: Outputs, labels: Tensor, alpha: float, temperature: float, objective: Objective
) -> Float[Tensor, "batch"]:
    """α · task loss + (1 − α) · objective by sample, for either of two networks; with α = 0 no label is read."""
    if alpha == 0:
        return objective(learner.logits, example.logits, temperature=temperature, reduction="none")
    return losses.distillation_loss(
        learner.logits, example.logits, labels, alpha, temperature, objective, reduction="none"
    )


@settings
class Trained(Taught):
    """For a method whose teacher knows the task before it teaches."""

    silent: ClassVar[Mapping[str, Any]] = {"untrained_teacher": False}

    untrained_teacher: bool = False
    """True: a teacher whose classifier was never trained may teach all the same; it is refused otherwise"""

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if models.is_fresh(run.teacher or "") and self.teacher_epochs == 0 and not self.untrained_teacher:
            found.append(untrained(run.teacher, run.method))
        return found


def untrained(teacher: str | None, method: str) -> str:
    """What is wrong with a teacher whose head is new."""
    return (
        f"the head of teacher {teacher!r} was never trained, and {method} would teach its random answers: leave "
        "teacher_epochs out, or give the epochs of a fine-tuning, or a teacher that was fine-tuned elsewhere "
        "(untrained_teacher=True asks for this one by name)"
    )


@settings
class TwoStages(Trained):
    """For a method that teaches one thing first and another one afterwards, in one run with a fixed teacher."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "fixed"

    first_stage: InnerShare = 0.5
    """share of the steps that the first stage has, a choice of this book; each stage has a warm-up and a decay of its
    own, and the student is chosen among those of the second"""

    @property
    def stages(self) -> tuple[float, ...]:
        return self.first_stage, 1 - self.first_stage

    def check_steps(self, total: int) -> None:
        if not 0 < stage_ends(self.stages, total)[0] < total:
            raise ValueError(
                f"first_stage is {self.first_stage}, and the student takes {total} steps: one of the two stages has "
                "none; train longer"
            )


@settings
class Learning(Imitating):
    """A teacher that learns while it teaches."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "learning"
    slower: ClassVar[float] = 1.0
    """Its learning rate over that of its fine-tuning."""

    teaching_rate: Rate = by_rule()
    """learning rate of a teacher while it teaches; None: teacher_learning_rate, for metadistil and ikd a tenth of it"""

    def completed(self, run: Run) -> dict[str, Any]:
        return {**super().completed(run), "teaching_rate": self.teacher_learning_rate * self.slower}

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if run.precision == "fp16":
            found.append(f"precision 'fp16' has one loss scale for two networks that learn; {run.method} needs 'bf16'")
        return found


@settings
class Mutual(Learning):
    """A teacher that learns from the labels, and imitates its student."""

    teacher_alpha: Share = by_rule()
    """weight of the labels for the teacher, 1 − this that of the student; None: alpha"""
    teacher_objective: Annotated[str, among(losses.TEACHER_OBJECTIVES)] = by_rule()
    """what the teacher imitates in the student; None: the student's objective, roles exchanged"""

    def __post_init__(self) -> None:
        super().__post_init__()
        fill(self, teacher_alpha=self.alpha, teacher_objective=self.objective)

    def teachers_loss(self, teacher: Outputs, student: Outputs, labels: Tensor) -> Float[Tensor, "batch"]:
        """The loss of every sample for the teacher's outputs, given the student's.

        The objective is called with the roles exchanged, so KL means KL(p_s ‖ p_t) here, and
        "reverse_soft_cross_entropy" is LGTM eq. (3) as printed.  It imitates predictions only.
        """
        objective = losses.TEACHER_OBJECTIVES[self.teacher_objective]
        return _mixture(teacher, student, labels, self.teacher_alpha, self.temperature, objective)

    @property
    def compares_samples(self) -> bool:
        return super().compares_samples or self.teacher_objective in losses.BATCH_OBJECTIVES


@settings
class Together(Mutual):
    """A teacher that may learn the task while it teaches it."""

    starts_untrained: ClassVar[bool] = True

    zero_classifiers: bool | None = None
    """start both classifiers at zero; None: where the teacher is not fine-tuned, dist aside"""

    def completed(self, run: Run) -> dict[str, Any]:
        untrained = self.teacher_epochs == 0 and run.teacher != models.BOOK_TEACHER and self.objective != "dist"
        return {**super().completed(run), "zero_classifiers": untrained}

    def prepare(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> None:
        for network in (student, teacher) if self.zero_classifiers else ():
            models.zero_classifier(network)


@settings
class Piloting(Imitating):
    """A pilot step of the student and its tangent."""

    pilot_learning_rate: Rate | None = None
    """learning rate of the pilot step; None: the student's, as it is at that step"""
    tangent: TangentMethod = "jvp"
    """derivative of the student by "jvp", "finite-difference" (central), "forward-difference" or "double-backward\""""
    tangent_precision: Literal["fp32", "autocast"] = "fp32"
    """pilot step and derivative in "fp32" or, with mixed precision, "autocast\""""
    feedback_batch_size: Size | None = None
    """samples of a feedback batch; None: batch_size"""

    def problems(self, run: Run) -> list[str]:
        return super().problems(run) + whole_batch(run.micro_batches)

    @property
    def compares_samples(self) -> bool:
        return False  # a batch is not cut anyway

    def completed(self, run: Run) -> dict[str, Any]:
        return {**super().completed(run), "feedback_batch_size": run.batch_size if self.feedback else None}

    def rate(self, student: Learner) -> float:
        """The learning rate of the pilot step, η_s."""
        present = student.optimizer.param_groups[0]["lr"]
        return present if self.pilot_learning_rate is None else self.pilot_learning_rate

    def lowered(self, student: Learner) -> AbstractContextManager[None]:
        """The precision of pilot step and derivative."""
        return student.accelerator.autocast() if self.tangent_precision == "autocast" else nullcontext()


def whole_batch(micro_batches: int) -> list[str]:
    """What is wrong with a cut batch where a pilot step is made."""
    found = f"micro_batches is {micro_batches}: the pilot step needs the whole batch at once; take 1 and a smaller "
    return [f"{found}batch_size"] if micro_batches > 1 else []


def check_whole_batch(*learners: Learner) -> None:
    """Raise ValueError for learners that cut the batch of a pilot step."""
    for problem in whole_batch(max(who.micro_batches for who in learners)):
        raise ValueError(problem)


@settings
class Feedback(Piloting):
    """Feedback data that nobody trains on."""

    silent: ClassVar[Mapping[str, Any]] = {"pilot_pieces": 1}

    pilot_rule: PilotRule = by_rule()
    """the pilot copy's step, "sgd" or "adamw"; None: "sgd", for influence "released" "adamw\""""
    pilot_pieces: Size = 1
    """cut the batches of pilot step and feedback gradient into so many to save memory"""
    feedback_from: Literal["validation"] | None = None
    """"validation" takes the feedback from the validation split, as the papers do, whose scores then mean nothing;
    None: from the training set"""
    observe: bool = False
    """metadistil: measure at every step what the pilot update is worth (four more passes); lgtm: how large the
    influence term is beside the auxiliary loss (two more backward passes)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        fill(self, pilot_rule="adamw" if getattr(self, "influence", None) == "released" else "sgd")
        if self.pilot_pieces > 1 and self.objective in losses.BATCH_OBJECTIVES:
            raise ValueError(
                f"pilot_pieces is {self.pilot_pieces}: objective {self.objective!r} compares the samples of a whole "
                "batch; take 1"
            )

    @property
    def feedback(self) -> str:
        return self.feedback_from or "feedback"

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if run.feedback_fraction == 0 and self.feedback_from is None:
            found.append(f"feedback_fraction is 0, but {run.method} needs a feedback split; leave it out, or give 0.1")
        if run.feedback_fraction and self.feedback_from is not None:
            found.append("feedback_fraction and feedback_from 'validation' are both given; give one")
        return found


def mean_entropy(logits: Float[Tensor, "batch classes"]) -> float:
    """The mean entropy of the predictions, in nats; 0 for a single output, where there is no distribution.

    Source: the entropy gap of LGTM Figures 5 and 6 is the difference of two of them.
    Derived in: chapters/04_online_distillation.
    """
    log_p = F.log_softmax(logits.detach().float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()
