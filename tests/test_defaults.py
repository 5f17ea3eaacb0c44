"""What a user gets who names nothing.  A default is a decision; here they stand side by side, each with its reason."""

import dataclasses
import inspect

import pytest

from kdlib import influence, learner, losses, pilot, policy, representations
from kdlib.methods import METHODS, ON_TEXT, ikd, lgtm, metadistil, on_text, task_agnostic, tutor, tutor_words
from kdlib.tangent import (
    distillation_influence,
    feedback_gradient,
    hessian_vector_product,
    influence_along,
    student_tangent,
)

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
    losses.spherical: SOFTENED,
    losses.distillation_loss: {**SOFTENED, "alpha": 0.5, "objective": losses.kl_divergence},
    # PKD (Sun et al., 2019): "skip" is the better of its two, and the paper adds up.
    representations.patient_layers: {"layers": "skip"},
    representations.patient: {"layers": "skip", "normalisation": "sum", "reduction": "mean"},
    # BERT's own: a tenth of warm-up, decay 0.01, clipping at one; and the whole batch at once.
    learner.learner: {
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "micro_batches": 1,
        "stages": (1.0,),
    },
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
    pilot.teaching_experiment: {"rule": "sgd", "steps": 1, "pieces": 1},  # MetaDistil eq. (2)
    metadistil.metadistil: {"watch": None},
    ikd.feedback: {"weight": 1.0, "temperature": 1.0},
    lgtm.lgtm: {"watch": None},
    tutor_words.mixed_reward: {"weight": 0.5},
    tutor_words.Lesson.rewards: {"weight": 0.5},
    tutor_words.tutor_loss: {"baseline": 0.0, "kl_weight": 1.0},
    tutor_words.modified_loss: {"temperature": 1.0, "reduction": "mean"},
    tutor.Tutor: {"start": "teacher", "seed": 0},
    on_text.Student: {"seed": 0},
    tutor.inner_loss: {"attention": True},
    task_agnostic.soft_labels: {"temperature": 1.0},
    task_agnostic.distilbert: {"temperature": 2.0, "weights": (5.0, 2.0, 1.0)},  # DistilBERT's released code
    task_agnostic.tinybert: {"attention": True},
    task_agnostic.minilm_v2: {"relation_heads": 12, "teacher_layer": None},
}

# None is decided by other fields, or by the run: what it says of itself tells how.
UNLABELLED = {"labelled_course": True}
TAUGHT = {
    # A run of its own with a run's own defaults: another student does not fine-tune another teacher.
    "teacher_epochs": None,
    "teacher_learning_rate": None,
    "teacher_batch_size": 32,
    "teacher_micro_batches": 1,
    "teacher_weight_decay": 0.01,
    "teacher_warmup_ratio": 0.1,
    "teacher_max_grad_norm": None,
    "teacher_evaluate_every": None,
    "teacher_seed": 0,
}
IMITATING = {
    **TAUGHT,
    "alpha": None,  # half from the labels, where there are any
    "temperature": 2.0,  # a run softens; the losses alone do not
    "objective": "kl",
    "pkd_weight": 0.0,  # an addition that costs hidden states
    "pkd_layers": None,
    "pkd_normalisation": None,
}
TRAINED = {"untrained_teacher": False}
LEARNING = {"teaching_rate": None}
MUTUAL = {**LEARNING, "teacher_alpha": None, "teacher_objective": None}
TOGETHER = {**MUTUAL, "zero_classifiers": None}
# The tangent is exact and in full precision, and nothing is cut, unless somebody asks for less.
PILOTING = {"pilot_learning_rate": None, "tangent": "jvp", "tangent_precision": "fp32", "feedback_batch_size": None}
FEEDBACK = {**PILOTING, "pilot_rule": None, "pilot_pieces": 1, "feedback_from": None, "observe": False}
WORDS = {"untrained_teacher": False}
UNTUTORED = {**WORDS, "attention": None, "logit_weight": 25.0, "inner_weight": 0.5}  # Tutor-KD: λ₁ = 25, λ₂ = 0.5
KD = {**IMITATING, **TRAINED, **UNLABELLED}
STAGED = {**TAUGHT, **TRAINED, "first_stage": 0.5}
SETTINGS = {
    "fine_tune": {**UNLABELLED, "anchors": 0},
    "kd": KD,
    "pkd": {**KD, "pkd_weight": 1.0},
    "dist": {**KD, "objective": "dist", "temperature": 1.0},  # its released code
    "skd": {**KD, "objective": "spherical"},
    "takd": {**KD, "assistants": None},
    "rco": {**KD, "anchors": 4},  # MetaDistil's Table 1
    "annealing": {**STAGED, "max_temperature": 10},
    "theseus": {**TAUGHT, **TRAINED, "replacing_rate": 0.3, "replaced_after": 0.5, "replacement": "linear"},
    "tinybert_task": {**STAGED, "temperature": 1.0, "attention": None},
    "pesf": {**IMITATING, **TRAINED, **MUTUAL, "objective": "probability_mse", "adapter_size": 64},  # its released code
    "prokt": {**IMITATING, **TOGETHER, "first": "teacher"},  # LGTM eqs. (3)-(4)
    "dml": {**IMITATING, **TOGETHER, "temperature": 1.0, "first": "simultaneous"},  # Zhang et al.: both do the same
    "metadistil": {**IMITATING, **TRAINED, **LEARNING, **FEEDBACK, "pilot_update": True, "inner_steps": 1},
    "ikd": {
        **IMITATING,
        **TRAINED,
        **UNLABELLED,
        **LEARNING,
        **PILOTING,
        "meta_weight": 0.5,
        "feedback_at": "before",  # the paper's shortcut
        "exam": None,
    },
    "lgtm": {
        **IMITATING,
        **TOGETHER,
        **FEEDBACK,
        "influence": "weighted",  # eq. (9)
        "influence_weight": None,  # 1, as in the paper
        "influence_share": None,
        "feedback_every": 1,
        "feedback_layers": None,
        "auxiliary": True,
    },
    "mlm": {"trained": "all"},
    "soft_labels": {**WORDS, "temperature": 1.0},
    "distilbert": {**WORDS, "temperature": 2.0},  # DistilBERT's released code
    "tinybert": {"attention": None},
    "minilm": {},
    "minilm_v2": {"relation_heads": None},  # 12 where that divides the width
    "untutored": UNTUTORED,
    # Tutor-KD: λ = 0.5, one word for each position, no baseline.
    "tutor": {
        **UNTUTORED,
        "reward_weight": 0.5,
        "strategy": "tutor",
        "temperature": 1.0,
        "kl_weight": 1.0,
        "samples": 1,
        "baseline": "none",
        "imitated": "modified",
        "everywhere": False,
        "order": "together",
        "tutor_start": "teacher",
    },
}


@pytest.mark.parametrize("method", [*METHODS, *ON_TEXT])
def test_the_defaults_of_a_methods_settings_are_those_that_were_decided(method):
    kind = (METHODS | ON_TEXT)[method]
    assert {field.name: field.default for field in dataclasses.fields(kind)} == SETTINGS[method]


@pytest.mark.parametrize("function", TABLE, ids=lambda function: function.__qualname__)
def test_the_defaults_are_those_that_were_decided(function):
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == TABLE[function]


def test_the_released_codes_presets_are_its_own():
    """LGTM's code: the student learns from its teacher alone, the teacher by six tenths from the labels."""
    chosen = {"alpha": 0.0, "temperature": 1.0, "teacher_alpha": 0.6}
    chosen |= {"influence": "released", "pilot_rule": "adamw", "tangent": "finite-difference"}
    assert lgtm.LGTM(**chosen) == lgtm.RELEASED
    usual = dataclasses.asdict(lgtm.LGTM())
    others = {name for name, value in dataclasses.asdict(lgtm.RELEASED).items() if value != usual[name]}
    assert others == {*chosen, "influence_weight"}
