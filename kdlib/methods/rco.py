"""RCO: the student follows the route that its teacher took, from one of its early states to the next.

Source: RCO (Jin et al., 2019), a rival in LGTM Table 1 and MetaDistil Table 1.
"""

from typing import Any, ClassVar, Literal

from kdlib.learner import Batch
from kdlib.methods.base import Cast, Run, Step
from kdlib.methods.kd import KD, distillation
from kdlib.models import Outputs
from kdlib.settings import Layers, settings


@settings
class RCO(KD):
    """A teacher that is fixed, but shown first as it was early in its own fine-tuning."""

    asks: ClassVar[Literal["answers", "network", "route"]] = "route"

    anchors: Layers = 4
    """how many states of the teacher are shown, the final one among them, each for as many steps"""

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if self.teacher_epochs == 0:
            found.append(
                "teacher_epochs is 0, but rco needs a fine-tuning of the teacher, where its anchors lie: leave it out"
            )
        return found

    def teachers_run(self, run: Run) -> dict[str, Any] | None:
        own = super().teachers_run(run)
        return own and {**own, "anchors": self.anchors - 1}

    def step(self, cast: Cast) -> Step:
        def shown(batch: Batch) -> Outputs:
            """The answers of the anchor whose turn it is."""
            turn = cast.student.taken * len(cast.route) // cast.total
            return cast.route[min(turn, len(cast.route) - 1)](batch)

        return distillation(cast.student, shown, self)
