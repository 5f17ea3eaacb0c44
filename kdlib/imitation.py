"""What one network learns from the labels and from another network: the student from its teacher, or the other way.

The rule by which a teacher changes (`kdlib.methods`) and what is imitated are independent: every method takes an
`Imitation` and never asks what is in it.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kdlib import losses, representations
from kdlib.losses import Objective
from kdlib.models import Outputs


@dataclass(frozen=True)
class Imitation:
    """α · task loss + (1 − α) · objective at temperature T + β · PKD, one value per sample.

    `alpha` weighs the labels; `pkd_weight` is β, the weight of the hidden states, which are not looked at while it is
    zero.

    Raises ValueError unless 0 ≤ α ≤ 1 and β ≥ 0; a call raises what the losses raise.

    Source: LGTM eq. (1), MetaDistil eq. (1), IKD eq. (4).  Derived in: chapters/01_distillation.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    objective: Objective = losses.kl_divergence
    pkd_weight: float = 0.0
    pkd_layers: Literal["skip", "last"] = "skip"
    pkd_normalisation: Literal["sum", "mean"] = "sum"

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected a weight between 0 (the other network only) and 1")
        if not self.pkd_weight >= 0:
            raise ValueError(f"pkd_weight is {self.pkd_weight}; expected 0 (no hidden states) or more")

    @property
    def wanted(self) -> dict[str, bool]:
        """What the networks must answer besides logits, as arguments of `models.outputs` and `models.apply`."""
        return {"hidden_states": True} if self.pkd_weight > 0 else {}

    def __call__(self, learner: Outputs, example: Outputs, labels: Tensor) -> Float[Tensor, "batch"]:
        """The loss of every sample for the outputs of the one who learns, given those of the example.

        With α = 0 the labels are not read.
        """
        if self.alpha == 0:
            loss = self.agreement(learner, example)
        else:
            loss = losses.distillation_loss(
                learner.logits, example.logits, labels, self.alpha, self.temperature, self.objective, reduction="none"
            )
        if self.pkd_weight == 0:
            return loss
        states = representations.patient(
            learner.hidden_states, example.hidden_states, self.pkd_layers, self.pkd_normalisation, reduction="none"
        )
        return loss + self.pkd_weight * states

    def agreement(self, learner: Outputs, example: Outputs) -> Float[Tensor, "batch"]:
        """The objective alone: how far the one who learns is from the example, by sample."""
        return self.objective(learner.logits, example.logits, temperature=self.temperature, reduction="none")
