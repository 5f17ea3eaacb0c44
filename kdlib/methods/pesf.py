"""PESF-KD: of the teacher only an adapter learns, together with the student.

Source: PESF-KD (Rao et al., 2022), a rival in LGTM Table 1.

The code released with it means to fix the rest of the teacher, but sets an attribute that does not exist
(`required_grad`) and gives all weights to the optimiser: there the whole teacher learns (1170300319/PESF-KD at d3f6aa8,
nlp/run_glue_distillation.py).  Here it is as the paper has it.
What is fixed answers without dropout.  A run leaves `adapter.safetensors`: `adapt` the network of its teacher's run,
then `load_state_dict(checkpoints.read_tensors(path)[0], strict=False)`.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib import losses, models
from kdlib.methods.base import Cast, Mutual, Step, Trained
from kdlib.methods.online import at_once
from kdlib.settings import Size, among, settings


@settings
class PESFKD(Mutual, Trained):
    """A fixed teacher with an adapter on its logits that learns with the student."""

    objective: Annotated[str, among(losses.OBJECTIVES)] = "probability_mse"
    """what both imitate in each other"""
    adapter_size: Size = 64
    """hidden units of the adapter"""

    def prepare(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> None:
        adapt(teacher, self.adapter_size, seed)

    def step(self, cast: Cast) -> Step:
        return at_once(*cast.pair, self)


class Adapted(nn.Module):
    """A classifier's last layer and, on top of its logits, what an adapter makes of the same features."""

    def __init__(self, head: nn.Linear, size: int):
        super().__init__()
        classes = head.out_features
        self.head = head
        last = nn.Linear(size, classes)
        self.adapter = nn.Sequential(nn.Linear(head.in_features, classes), nn.Linear(classes, size), nn.ReLU(), last)
        for weights in last.parameters():  # it begins as nothing, so that the teacher begins as it is
            nn.init.zeros_(weights)

    def forward(self, features: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch classes"]:
        """The adapted logits."""
        logits: Tensor = self.head(features) + self.adapter(features)
        return logits


def adapt(teacher: PreTrainedModel, size: int, seed: int = 0) -> None:
    """Freeze a classifier and put an adapter of `size` hidden units, drawn from `seed`, on its last layer, in place.

    Raises what `models.output_layer` raises.
    """
    head = models.output_layer(teacher)
    teacher.requires_grad_(False)
    for part in teacher.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = Adapted(head, size).to(head.weight)
    place = teacher if teacher.classifier is head else teacher.classifier
    setattr(place, "classifier" if place is teacher else "out_proj", adapted)
