"""RCO: the student follows the route that its teacher took, from one of its early states to the next.

The paper also chooses the states by how hard the student finds them; here they lie after equal numbers of steps.

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
    """A fixed teacher, shown as it was at points of its own fine-tuning, early ones first."""

    asks: ClassVar[Literal["answers", "network", "route"]] = "route"

    anchors: Layers = 4
    """how many states of the teacher are shown, each for as many steps: those after equal parts of its fine-tuning, and
    last the one that other methods have, of its best evaluation, which may be older than some of them"""

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if self.teacher_epochs == 0:
            found.append(
                "teacher_epochs is 0, but rco needs a fine-tuning of the teacher, where its anchors are: give "
                "teacher_epochs"
            )
        return found

    def teachers_run(self, run: Run) -> dict[str, Any] | None:
        own = super().teachers_run(run)
        return own and {**own, "anchors": self.anchors - 1}

    def check_steps(self, total: int) -> None:
        if total < self.anchors:
            raise ValueError(
                f"anchors is {self.anchors}, but the student takes {total} steps and would not see the last ones: give "
                "fewer, or train longer"
            )

    def step(self, cast: Cast) -> Step:
        def shown(batch: Batch) -> Outputs:
            """The answers of the anchor whose turn it is."""
            turn = cast.student.taken * len(cast.route) // cast.total
            return cast.route[min(turn, len(cast.route) - 1)](batch)

        return distillation(cast.student, shown, self)
