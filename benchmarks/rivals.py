"""What does a step of each method cost?  All methods on a task, for the same two networks, in one run.

    python benchmarks/rivals.py [--layers 6 3] [--hidden 384] [--batch 16] [--tokens 64] [--turns 7]

Passes are counted by hooks on the encoder layers, in passes of the whole encoder: a network half of whose layers run
has half a pass.  A pass that carries a tangent along counts as three, see `benchmarks/step.py`.  A fixed teacher whose
logits are all that is asked for answers once for a whole training, which a step does not pay.  Seconds are those of
whole steps with their updates, the fastest of the turns; "saved" is the most that autograd keeps for backward passes
at one time.

Ratios within one run are what counts.  --write stores the table in data/benchmarks/rivals.csv.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd import forward_ad
from transformers import BertForSequenceClassification

from benchmarks.influence import CLASSES, random_batch, seconds
from benchmarks.step import WORDS, Saved
from kdlib import models
from kdlib.learner import Batch, Learner, accelerator_for, learner
from kdlib.methods import METHODS
from kdlib.methods.base import Cast, Method, Step
from kdlib.methods.kd import PKD

TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "rivals.csv"
PLAIN = "kd"
FOREVER = 10**6
Network = BertForSequenceClassification


@contextmanager
def passes(**networks: Network) -> Iterator[Counter]:
    """Counts passes of encoders while the block runs, by "student, forward" and so on."""
    counts: Counter[str] = Counter()

    def ran(who: str, share: float, module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        counts[f"{who}, forward"] += share * (1 if forward_ad.unpack_dual(states).tangent is None else 3)
        if states.requires_grad:
            states.register_hook(lambda _: counts.update({f"{who}, backward": share}))

    hooks = [
        layer.register_forward_hook(partial(ran, who, 1 / len(layers)))
        for who, network in networks.items()
        for layers in [models.encoder_layers(network)]
        for layer in layers
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def networks(
    layers: tuple[int, int], hidden: int
) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """A student and a teacher with random weights and BERT's dropout."""
    made = []
    for depth in reversed(layers):
        torch.manual_seed(0)
        config = models.tiny_config(f"tiny-{depth}x{hidden}", WORDS, CLASSES)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        made.append(BertForSequenceClassification._from_config(config, attn_implementation=models.FAST_ATTENTION))
    return made[0], made[1]


def learners_of(
    method: str, layers: tuple[int, int], hidden: int, accelerator: Accelerator, **told: Any
) -> tuple[Method, Learner, Learner]:
    """A method's settings, and a student and a teacher that are prepared for it; its training never ends."""
    settings, pair = METHODS[method](**told), networks(layers, hidden)
    settings.prepare(*pair)
    student, teacher = (
        learner(name, one.train(), accelerator, 1e-5, FOREVER, warmup_ratio=0.0, stages=settings.stages)
        for name, one in zip(("student", "teacher"), pair, strict=True)
    )
    if settings.teaches == "fixed":
        teacher.module.eval()
    return settings, student, teacher


def step_of(settings: Method, student: Learner, teacher: Learner) -> Step:
    """A step; logits of a fixed teacher that are all that is asked for are in the batch, as if looked up."""

    def answers(batch: Batch) -> models.Outputs:
        if isinstance(settings, PKD):
            return models.targets(teacher.module, batch, **settings.wanted)
        return models.Outputs(batch["teacher_logits"])

    if settings.teaches == "learning":
        return settings.step(Cast(student, teacher))
    return settings.step(Cast(student, None, answers, None, teacher.module, [answers], FOREVER))


def batches(samples: int, tokens: int) -> tuple[Batch, Batch]:
    """A batch and a feedback batch, with logits of a teacher that does not learn."""
    found = []
    for seed in (0, 1):
        batch = random_batch(samples, tokens, "cpu", seed, WORDS)
        batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"]), "rows": torch.arange(samples)}
        found.append(batch)
    return found[0], found[1]


def costs(layers: tuple[int, int], hidden: int, samples: int, tokens: int, turns: int) -> pd.DataFrame:
    """A row for each method."""
    accelerator, data, cases = accelerator_for("cpu"), batches(samples, tokens), {}
    for method in METHODS:
        settings, *pair = learners_of(method, layers, hidden, accelerator)
        step = step_of(settings, *pair)
        cases[method] = partial(step, *data) if settings.feedback else partial(step, data[0]), *pair
    rows = []
    for method, (call, student, teacher) in cases.items():
        call()  # warms up, and makes the optimisers' moments
        counted: Counter[str] = Counter()
        times = 16 if method == "theseus" else 1  # a matter of chance there
        with passes(student=student.module, teacher=teacher.module) as counts:
            for _ in range(times):
                call()
        counted.update(counts)
        saved = Saved([student.module, teacher.module])
        with saved:
            for _ in range(times):
                call()
        size = {"layers": f"{layers[0]} → {layers[1]}", "hidden": hidden, "batch": samples, "tokens": tokens}
        both = {f"{who}, {kind}": counted[f"{who}, {kind}"] / times for who in ("student", "teacher") for kind in KINDS}
        rows.append({**size, "method": method, **both, "saved MiB": saved.most / 2**20})
    timed: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(turns):
        for method, (call, _, _) in cases.items():
            timed[method].append(seconds(call, "cpu"))
    return tidy(pd.DataFrame(rows).assign(seconds=[min(found) for found in timed.values()]))


KINDS = ("forward", "backward")


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """With the seconds as multiples of plain distillation's."""
    floor = table.loc[table["method"] == PLAIN, "seconds"].item()
    counts = [f"{who}, {kind}" for who in ("student", "teacher") for kind in KINDS]
    found = table.assign(**{"seconds / kd": table["seconds"] / floor})
    return found.round({**dict.fromkeys(counts, 2), "saved MiB": 1, "seconds": 4, "seconds / kd": 2})


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(6, 3), help="of the teacher and the student")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    table = costs(tuple(asked.layers), asked.hidden, asked.batch, asked.tokens, asked.turns)
    print(table.to_string(index=False))
    if asked.write:
        table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
