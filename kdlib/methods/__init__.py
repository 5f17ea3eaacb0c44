"""One file per paper; each reads like the paper's algorithm, after the settings that its method has.

A method is one file and one entry here.
"""

from kdlib.methods.annealing import AnnealingKD
from kdlib.methods.base import Method
from kdlib.methods.ikd import IKD
from kdlib.methods.kd import DIST, KD, PKD, SKD, FineTune
from kdlib.methods.lgtm import LGTM
from kdlib.methods.metadistil import MetaDistil
from kdlib.methods.on_text import OnText
from kdlib.methods.online import DML, ProKT
from kdlib.methods.pesf import PESFKD
from kdlib.methods.rco import RCO
from kdlib.methods.takd import TAKD
from kdlib.methods.task_agnostic import MLM, DistilBERT, MiniLM, MiniLMv2, SoftLabels, TinyBERT
from kdlib.methods.theseus import Theseus
from kdlib.methods.tinybert_task import TinyBERTOnTask
from kdlib.methods.tutor import TutorKD, Untutored

METHODS: dict[str, type[Method]] = {
    "fine_tune": FineTune,
    "kd": KD,
    "pkd": PKD,
    "dist": DIST,
    "skd": SKD,
    "takd": TAKD,
    "rco": RCO,
    "annealing": AnnealingKD,
    "theseus": Theseus,
    "tinybert_task": TinyBERTOnTask,
    "pesf": PESFKD,
    "prokt": ProKT,
    "dml": DML,
    "metadistil": MetaDistil,
    "ikd": IKD,
    "lgtm": LGTM,
}
"""The settings class of each method, by the name that a run's configuration has for it."""

ON_TEXT: dict[str, type[OnText]] = {
    "mlm": MLM,
    "soft_labels": SoftLabels,
    "distilbert": DistilBERT,
    "tinybert": TinyBERT,
    "minilm": MiniLM,
    "minilm_v2": MiniLMv2,
    "untutored": Untutored,
    "tutor": TutorKD,
}
"""Likewise of the methods on plain text: masked language modelling without a teacher, the baselines of Tutor-KD's
tables, Tutor-KD without and with its tutor."""
