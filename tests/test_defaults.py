"""What a user gets who names nothing.  A default is a decision; here they stand side by side, each with its reason."""

import dataclasses
import inspect

import pytest

from kdlib import imitation, influence, learner, losses, pilot, policy, representations
from kdlib.methods import ikd, lgtm, metadistil, online, task_agnostic, tutor
from kdlib.tangent import (
    distillation_influence,
    feedback_gradient,
    hessian_vector_product,
    influence_along,
    student_tangent,
)

# The tangent is exact and in full precision, and nothing is cut, unless somebody asks for less.
EXACT = {"tangent": "jvp", "tangent_precision": "fp32", "pilot_pieces": 1, "pilot_rule": "sgd"}
SOFTENED = {"temperature": 1.0, "reduction": "mean"}
TABLE = {
    # One unit of everything: T = 1, means over the batch, KL from teacher to student, equal weights of two parts.
    losses.cross_entropy: {"reduction": "mean"},
    losses.squared_error: {"reduction": "mean"},
    losses.task_loss: {"reduction": "mean"},
    losses.kl_divergence: {**SOFTENED, "direction": "forward"},
    losses.reverse_kl_divergence: SOFTENED,
    losses.soft_cross_entropy: SOFTENED,
    losses.reverse_soft_cross_entropy: SOFTENED,
    losses.logit_mse: SOFTENED,
    losses.probability_mse: SOFTENED,
    losses.dist: {**SOFTENED, "inter": 1.0, "intra": 1.0},
    losses.distillation_loss: {**SOFTENED, "alpha": 0.5, "objective": losses.kl_divergence},
    # PKD (Sun et al., 2019): "skip" is the better of its two, and the paper adds up.
    representations.patient_layers: {"layers": "skip"},
    representations.patient: {"layers": "skip", "normalisation": "sum", "reduction": "mean"},
    imitation.Imitation: {
        "alpha": 0.5,
        "temperature": 1.0,
        "objective": losses.kl_divergence,
        "pkd_weight": 0.0,
        "pkd_layers": "skip",
        "pkd_normalisation": "sum",
    },
    # BERT's own: a tenth of warm-up, decay 0.01, clipping at one; and the whole batch at once.
    learner.learner: {"weight_decay": 0.01, "warmup_ratio": 0.1, "max_grad_norm": 1.0, "micro_batches": 1},
    learner.Learner: {"max_grad_norm": 1.0, "micro_batches": 1},
    learner.accelerator_for: {"device": "auto", "precision": "fp32"},
    # DARTS and LGTM's code move by 0.01.
    student_tangent: {"method": "jvp", "radius": 0.01, "outputs": None},
    feedback_gradient: {"loss": pilot.task_loss, "among": None, "pieces": 1},
    distillation_influence: {"labels": None},
    influence_along: {"method": "jvp"},
    influence.per_sample_gradients: {"loss": pilot.task_loss, "method": "loop", "chunk_size": None},
    hessian_vector_product: {"method": "forward-over-reverse"},
    influence.conjugate_gradient: {"damping": 0.0, "iterations": 100, "tolerance": 1e-6},
    influence.lissa: {"damping": 0.0, "scale": 1.0},
    influence.classical_influence: {"method": "jvp"},
    influence.tracin: {"loss": pilot.task_loss, "feedback_loss": pilot.task_loss, "method": "jvp"},
    pilot.gradient: {"loss": pilot.task_loss, "create_graph": False, "among": None, "pieces": 1},
    pilot.sgd_step: {"create_graph": False},
    # torch's AdamW, before its first step.
    pilot.AdamWState: {"step": 0, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    pilot.adamw_state: {"learning_rate": None},
    policy.draw_actions: {"samples": 1, "generator": None},
    policy.reinforce: {"baseline": 0.0},
    policy.running_mean: {"decay": 0.9},
    representations.hidden_mse: {"projection": None, "pairs": None},
    representations.attention_mse: {"of": "distributions"},  # as Tutor-KD prints it
    representations.relation_kl: {"relation_heads": None},
    online.online_distillation: {"first": "teacher"},  # LGTM eqs. (3)-(4)
    metadistil.metadistil: {
        **EXACT,
        "pilot_update": True,
        "inner_steps": 1,
        "pilot_learning_rate": None,
        "watch": None,
    },
    ikd.ikd: {
        "meta_weight": 0.5,
        "feedback_at": "before",  # the paper's shortcut
        "labelled_course": True,
        "pilot_learning_rate": None,
        "tangent": "jvp",
        "tangent_precision": "fp32",
    },
    ikd.feedback: {"weight": 1.0, "temperature": 1.0},
    lgtm.lgtm: {
        **EXACT,
        "influence": "weighted",  # eq. (9)
        "weight": 1.0,
        "share": None,
        "pilot_learning_rate": None,
        "feedback_every": 1,
        "feedback_layers": None,
        "observe": False,
        "watch": None,
    },
    lgtm.released: {"imitation": lgtm.RELEASED_STUDENT, "teacher_imitation": lgtm.RELEASED_TEACHER},
    # Tutor-KD: λ = 0.5, λ₁ = 25, λ₂ = 0.5, one word for each position, no baseline.
    tutor.Settings: {
        "reward_weight": 0.5,
        "strategy": "tutor",
        "logit_weight": 25.0,
        "inner_weight": 0.5,
        "temperature": 1.0,
        "kl_weight": 1.0,
        "samples": 1,
        "baseline": "none",
        "imitated": "modified",
        "attention": True,
        "everywhere": False,
        "order": "together",
    },
    tutor.mixed_reward: {"weight": 0.5},
    tutor.Lesson.rewards: {"weight": 0.5},
    tutor.tutor_loss: {"baseline": 0.0, "kl_weight": 1.0},
    tutor.modified_loss: {"temperature": 1.0, "reduction": "mean"},
    tutor.Tutor: {"start": "teacher", "seed": 0},
    tutor.Student: {"seed": 0},
    tutor.inner_loss: {"attention": True},
    tutor.tutor_kd: {"settings": None},
    task_agnostic.soft_labels: {"temperature": 1.0},
    task_agnostic.distilbert: {"temperature": 2.0, "weights": (5.0, 2.0, 1.0)},  # DistilBERT's released code
    task_agnostic.tinybert: {"attention": True},
    task_agnostic.minilm_v2: {"relation_heads": 12, "teacher_layer": None},
}


@pytest.mark.parametrize("function", TABLE, ids=lambda function: function.__qualname__)
def test_the_defaults_are_those_that_were_decided(function):
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == TABLE[function]


def test_the_released_codes_presets_are_its_own():
    """LGTM's code: the student learns from its teacher alone, the teacher by six tenths from the labels."""
    chosen = [dataclasses.asdict(preset) for preset in (lgtm.RELEASED_STUDENT, lgtm.RELEASED_TEACHER)]
    plain = dataclasses.asdict(imitation.Imitation())
    assert chosen == [plain | {"alpha": 0.0}, plain | {"alpha": 0.6}]
