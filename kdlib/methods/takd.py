"""TAKD: between a large teacher and a small student stand assistants, each distilled from the one before.

Source: TAKD (Mirzadeh et al., 2020), a rival in LGTM Table 1, MetaDistil Table 1 and IKD Table 1.
"""

from typing import Any

from kdlib import models
from kdlib.methods.base import TRAINING, Run
from kdlib.methods.kd import KD
from kdlib.settings import Name, by_rule, settings


@settings
class TAKD(KD):
    """A fixed teacher that was itself distilled from a larger one: a teaching assistant."""

    assistants: Name = by_rule()
    """their networks, the largest first, joined by commas; a number stands for so many of the teacher's first layers;
    None: between two tiny networks given by name, one half-way"""

    @classmethod
    def defaults(cls, run: Run) -> dict[str, Any]:
        return {**super().defaults(run), "assistants": _between(run.teacher or "", run.student or "")}

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        found += models.name_problems(*(name for name in self.networks if not name.isdecimal()))
        if any(name.isdecimal() and int(name) < 1 for name in self.networks):
            found.append(f"assistants is {self.assistants!r}; expected numbers of layers from 1 on")
        if not self.networks:
            found.append(
                "assistants is missing: name the networks between teacher and student, such as assistants=10, which is "
                "the teacher's first ten layers, or assistants=tiny-3x96,tiny-2x64"
            )
        return found

    @property
    def networks(self) -> list[str]:
        return [name.strip() for name in (self.assistants or "").split(",") if name.strip()]

    def teachers_run(self, run: Run) -> dict[str, Any]:
        """The last assistant's: distilled as the student is, from the teacher or from the assistant before.

        Its seed is `teacher_seed`, so that all seeds of a student share it.
        """
        *before, last = self.networks
        named = None if last.isdecimal() else last
        networks = {"student": named, "student_layers": None if named else int(last)}
        own = {name: value for name, value in self.flat.items() if name not in ("assistants", "labelled_course")}
        trained = {name: getattr(run, name, None) for name in TRAINING}
        chain = {"method": "takd", "assistants": ",".join(before)} if before else {"method": "kd"}
        rates = {"learning_rate": run.learning_rate, "seed": self.teacher_seed, "evaluate_every": None}
        return {**trained, **own, **rates, **chain, "predict_test": False, "teacher": run.teacher, **networks}


def _between(teacher: str, student: str) -> str | None:
    """A tiny network half-way between two."""
    both = models.is_tiny(teacher) and models.is_tiny(student)
    if not both or models.name_problems(teacher, student):
        return None
    shapes = [models.tiny_config(name, 1, 1) for name in (teacher, student)]
    layers = round(sum(shape.num_hidden_layers for shape in shapes) / 2)
    width = sum(shape.hidden_size for shape in shapes) // 32 * 16
    return f"tiny-{layers}x{width}h{width // 16}"
