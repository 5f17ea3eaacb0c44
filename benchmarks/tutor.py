"""What does a step of Tutor-KD cost, beside plain distillation of soft labels?

    python benchmarks/tutor.py [--device cuda --precision bf16] [--students tutor-5.7m tutor-9m] [--batch 16]

Tokens per second of whole training steps, updates by AdamW included, padding not counted, and the most memory that
a step's tensors need at one time (on a GPU as the allocator sees it).  The teacher has MiniLM's shape, six layers of
384 units with BERT's vocabulary; all weights are random, which costs the same.  Both ways see the same batches.

Soft labels ask the teacher once and the student for words.  Tutor-KD asks the teacher twice and the student for a score
of each word, trains a head of the teacher's size, and compares all that is inside the two networks.

Ratios within one run are what counts: the ways take turns, and the fastest turn of each is taken.  On a CPU one thread
works, and its own time is counted, which other programs of the machine do not stretch.
--write stores the table in data/benchmarks/tutor.csv.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedModel

from benchmarks.influence import peak_bytes, random_batch, seconds
from kdlib import corpus, models
from kdlib.learner import Learner, accelerator_for, learner
from kdlib.methods import task_agnostic
from kdlib.methods.base import Step
from kdlib.methods.on_text import Student
from kdlib.methods.tutor import Tutor, TutorKD, tutor_kd

WORDS, SPECIAL, MASK = 30_522, (0, 100, 101, 102, 103), 103  # BERT's
SOFT, TUTORED = "soft labels", "Tutor-KD"
TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "tutor.csv"
CASE = ["student", "batch", "tokens", "precision", "device"]


def network(config: BertConfig) -> PreTrainedModel:
    """A masked language model with random weights."""
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config, attn_implementation=models.FAST_ATTENTION)


def teacher_network(device: str, words: int = WORDS) -> PreTrainedModel:
    """Of MiniLM's shape, fixed."""
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return network(BertConfig(vocab_size=words, **shape)).requires_grad_(False).to(device).eval()


def ways(name: str, teacher: PreTrainedModel, device: str, precision: str) -> dict[str, Step]:
    """A step of each kind; each has a student, and a tutor, of its own."""
    accelerator, width = accelerator_for(device, precision), teacher.config.hidden_size

    def learned(who: str, module: torch.nn.Module) -> Learner:
        return learner(who, module.train(), accelerator, 1e-5, 1000, warmup_ratio=0.0)

    def student() -> Learner:
        return learned("student", Student(network(models.shape_config(name, teacher.config.vocab_size, 2)), width))

    def tutored(**settings) -> Step:
        tutor = learned("tutor", Tutor(teacher))
        return tutor_kd(student(), tutor, teacher, SPECIAL, MASK, TutorKD(**settings))

    alone = student()
    soft = task_agnostic.soft_labels(alone.module, teacher)
    return {
        SOFT: lambda batch: {"loss": alone.minimise(soft, batch)},
        TUTORED: tutored(),
        "Tutor-KD without attention": tutored(attention=False),
        "Tutor-KD without what is inside": tutored(inner_weight=0.0),
        "Tutor-KD, in turns": tutored(order="in turns"),
    }


def batch_of(samples: int, tokens: int, device: str, words: int = WORDS) -> dict[str, torch.Tensor]:
    """Sentences of half to all of `tokens` random words, of which 15 % are masked."""
    batch = {**random_batch(samples, tokens, device, 0, words - 1000), "rows": torch.arange(samples)}
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"] + 999 * batch["attention_mask"]
    del batch["teacher_logits"]
    return corpus.Masking(SPECIAL, MASK, words)(batch, 0)


def costs(name: str, samples: int, tokens: int, device: str, precision: str, turns: int) -> list[dict]:
    """The rows of the table for one size."""
    steps = ways(name, teacher_network(device), device, precision)
    batch = batch_of(samples, tokens, device)
    calls = {way: partial(step, batch) for way, step in steps.items()}
    for call in calls.values():
        call()  # warms up, and makes the optimisers' moments
    peaks = {way: peak_bytes(call, device) for way, call in calls.items()}
    times = {way: [] for way in calls}
    for _ in range(turns):
        for way, call in calls.items():
            times[way].append(busy_seconds(call) if device == "cpu" else seconds(call, device))
    size = {"student": name, "batch": samples, "tokens": tokens, "precision": precision, "device": device}
    real = int(batch["attention_mask"].sum())
    return [{**size, "way": way, "seconds": min(times[way]), "real": real, "peak": peaks[way]} for way in calls]


def busy_seconds(function: Callable[[], object]) -> float:
    """The processor time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Costs with tokens per second and the ratios to soft labels."""
    table = pd.DataFrame(rows)
    keys = list(table[CASE].itertuples(index=False, name=None))
    floor = table[table["way"] == SOFT].set_index(CASE)["seconds"].loc[keys].to_numpy()
    table["tokens / second"] = (table.pop("real") / table["seconds"]).round().astype(int)
    table["seconds / soft labels"] = (table["seconds"] / floor).round(2)
    table["peak MiB"] = (table.pop("peak") / 2**20).round(1)
    return table.round({"seconds": 4})


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--students", nargs="+", default=["tutor-5.7m", "tutor-9m"])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = []
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    for size in product(arguments.students, arguments.batch, arguments.tokens):
        rows += costs(*size, arguments.device, arguments.precision, arguments.turns)
    table = tidy(rows)
    print(table.drop(columns=["device", "precision"]).to_string(index=False))
    if arguments.write:
        table.drop(columns="device").to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
