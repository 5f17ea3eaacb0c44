"""TinyBERT on a task: first what is inside the teacher, then its predictions.

The paper distils twice, on text without labels (`kdlib.methods.task_agnostic`) and then like this on the task, whose
training set it makes larger by replacing words.  That augmentation is not part of the method here: it needs word
vectors and a masked language model, and what it makes is a training set, which a local `source` may hold.

Source: TinyBERT (Jiao et al., 2020), a rival in MetaDistil Table 1 ("w/o DA").
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdlib import losses, models, processes
from kdlib import representations as inner
from kdlib.learner import Batch, stage_ends
from kdlib.methods.base import Cast, Step, TwoStages
from kdlib.methods.on_text import check_heads, depth
from kdlib.settings import Temperature, settings


@settings
class TinyBERTOnTask(TwoStages):
    """First the teacher's hidden states and attention, layer by layer, then its predictions."""

    asks: ClassVar[Literal["answers", "network", "route"]] = "network"

    temperature: Temperature = 1.0
    """of both distributions in the second stage"""
    attention: bool | None = None
    """whether attention is imitated, head by head; None: where both networks have as many heads"""

    def check_shapes(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        inner.layer_map(student.num_hidden_layers, teacher.num_hidden_layers)
        if self.attention:
            check_heads(student, teacher, "leave attention out")

    def prepare(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> None:
        """The student gets W, a projection of its hidden states to the teacher's width, which learns with it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projection = nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False)
        student.projection = projection.to(next(student.parameters()))

    def release(self, student: PreTrainedModel) -> None:
        del student.projection

    def step(self, cast: Cast) -> Step:
        return tinybert_on_task(cast, self)


def tinybert_on_task(cast: Cast, settings: TinyBERTOnTask) -> Step:
    """Squared differences of hidden states and attention scores, then soft cross entropy; no label is read.

    Attention is averaged over heads, as the paper has it.  The soft cross entropy is added up over the classes and has
    the factor T², as everywhere here; the released code takes its mean and no factor.
    In a regression the second stage compares the scores, where the released code takes the labels.
    """
    student, teacher = cast.student, cast.network
    assert teacher is not None
    end = stage_ends(settings.stages, cast.total)[0]
    pairs = inner.layer_map(depth(student.module), depth(teacher))
    alike = student.module.config.num_attention_heads == teacher.config.num_attention_heads
    attention = alike if settings.attention is None else settings.attention
    compared = pairs[1:] if attention else ()

    def of_rows(rows: Batch) -> Tensor:
        words, real, types = rows["input_ids"], rows["attention_mask"], rows["token_type_ids"]
        with torch.no_grad(), models.evaluating(teacher):
            theirs = models.encode_tokens(teacher, words, real, [their for _, their in compared], types)
        ours = models.encode_tokens(student.module, words, real, [mine for mine, _ in compared], types)
        states = ours.hidden_states, theirs.hidden_states
        values = inner.hidden_mse(*states, real, student.module.projection, pairs)
        if attention:
            heads = (ours.queries, ours.keys), (theirs.queries, theirs.keys)
            values = values + inner.attention_mse(*heads, real, of="scores") / ours.queries[0].shape[1]
        return values

    def inside(batch: Batch) -> Tensor:
        return processes.by_rows(of_rows, batch)

    def predictions(batch: Batch) -> Tensor:
        aim, own = models.targets(teacher, batch).logits, models.logits(student.module, batch)
        if batch["labels"].is_floating_point():
            return losses.logit_mse(own, aim, reduction="none")
        return losses.soft_cross_entropy(own, aim, settings.temperature, "none")

    return lambda batch: {"loss": student.minimise(inside if student.taken < end else predictions, batch)}
