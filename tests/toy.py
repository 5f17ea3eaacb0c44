"""A toy problem for tests of the loop: a tiny BERT and token sequences whose class a bag of tokens tells."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from kdlib import glue, metrics, trainer
from kdlib.batches import Encoded
from kdlib.learner import Learner, accelerator_for, learner
from kdlib.methods import kd
from kdlib.models import predict

TASK = glue.generic_task("toy", "text", ("no", "yes"))
VOCABULARY = 40


def encoded(samples: int = 48, seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (samples,), generator=generator)
    tokens = torch.randint(5, VOCABULARY, (int(lengths.sum()),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = torch.stack([(part > 20).float().mean() > 0.5 for part in tokens.split(lengths.tolist())]).long()
    return Encoded(
        tokens.int(), torch.zeros_like(tokens).to(torch.int8), offsets, labels, torch.arange(samples) + 1000, 0
    )


def network(seed: int = 0, labels: int = 2, dropout: float = 0.1, layers: int = 1) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()  # as `models.load` returns it


def student(seed: int = 0, total_steps: int = 18, dropout: float = 0.1, **options) -> Learner:
    options = {"learning_rate": 1e-3, **options}
    return learner(
        "student", network(seed, dropout=dropout), accelerator_for("cpu"), total_steps=total_steps, **options
    )


def evaluate(who: Learner, split: Encoded):
    def measure() -> dict[str, float]:
        outputs = predict(who.module, split)
        return {"validation/accuracy": metrics.compute(("accuracy",), outputs, split.labels.numpy())["accuracy"]}

    return measure


def training(who: Learner, data: Encoded, schedule: trainer.Schedule, **others) -> trainer.Training:
    """Fine-tuning of one learner, chosen by its accuracy on the data it learns from, unless `others` say otherwise."""
    usual = {"step": kd.fine_tuning(who), "evaluate": evaluate(who, data), "select": "validation/accuracy"}
    return trainer.Training(learners=[who], data=data, schedule=schedule, **{**usual, **others})
