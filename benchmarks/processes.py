"""How much faster is a step on two processes?  Every method, with one thread for each process.

    python benchmarks/processes.py [--processes 2] [--hidden 256] [--layers 6 3] [--batch 32] [--tokens 64]

Seconds of a whole step, the update by AdamW included, on one process and on several; the share of the several's step in
which a process sends, receives or waits for the others ("talking"); and how many times faster the several are
("speed-up").  All weights are random, which costs the same.  The teachers on text have BERT's dropout and few words.

A step is only as fast as the slowest process, so other programs on the machine spoil the numbers.  The fastest of the
turns is taken.  --write stores the table in data/benchmarks/processes.csv.
"""

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForSequenceClassification

from benchmarks.influence import CLASSES, random_batch
from kdlib import corpus, models, processes
from kdlib.learner import Batch, Learner, accelerator_for, learner
from kdlib.methods import METHODS, ON_TEXT
from kdlib.methods.base import Cast
from kdlib.methods.on_text import Student, TextCast
from kdlib.methods.tutor import Tutor, TutorKD

WORDS, SPECIAL, MASK = 2000, (0, 1, 2, 3, 4), 4
TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "processes.csv"


def configuration(layers: int, hidden: int) -> BertConfig:
    """Of a BERT with heads of 32 units and BERT's dropout."""
    return BertConfig(
        vocab_size=WORDS,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 32,
        num_labels=CLASSES,
    )


def call_of(method: str, size: argparse.Namespace) -> Callable[[], object]:
    """A step of a method."""
    accelerator = accelerator_for("cpu")
    teachers, students = (configuration(layers, size.hidden) for layers in size.layers)

    def learned(name: str, module: torch.nn.Module) -> Learner:
        return learner(name, module.train(), accelerator, 1e-5, 1000, warmup_ratio=0.0)

    torch.manual_seed(0)
    batch = random_batch(size.batch, size.tokens, "cpu", 0, WORDS)
    batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"]), "rows": torch.arange(size.batch)}
    del batch["teacher_logits"]
    if method in METHODS:
        make = partial(BertForSequenceClassification._from_config, attn_implementation=models.FAST_ATTENTION)
        networks, settings = (make(students), make(teachers)), METHODS[method]()
        settings.prepare(*networks)
        student, teacher = (learned(name, one) for name, one in zip(("student", "teacher"), networks, strict=True))

        def answers(batch: Batch) -> models.Outputs:
            return models.targets(teacher.module, batch, **settings.wanted)

        step = settings.step(Cast(student, teacher, answers, None, teacher.module, [answers], total=1000))
        return partial(step, batch, batch) if settings.feedback else partial(step, batch)
    make = partial(AutoModelForMaskedLM.from_config, attn_implementation=models.FAST_ATTENTION)
    settings, network, teacher, maker = ON_TEXT[method](), make(students), None, None
    if settings.teaches == "nobody":
        student = learned("student", network)
    else:
        teacher = make(teachers).requires_grad_(False).eval()
        student = learned("student", Student(network, size.hidden))
        maker = learned("tutor", Tutor(teacher)) if isinstance(settings, TutorKD) else None
    words = corpus.Masking(SPECIAL, MASK, WORDS)(batch, 0)
    return partial(settings.step(TextCast(student, teacher, maker, SPECIAL, MASK)), words)


def measure(number: int, several: int, port: int, size: argparse.Namespace, folder: str) -> None:
    """In one of several processes: the seconds of each method's step, and those of talking in it, into a file."""
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": several, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    talked, talking = [0.0], processes._talking

    @contextmanager
    def timed() -> Iterator[None]:
        started = time.perf_counter()
        with talking():
            yield
        talked[0] += time.perf_counter() - started

    processes._talking = timed
    rows = []
    for method in size.methods:
        call = call_of(method, size)
        call()  # warms up, and makes the optimisers' moments
        turns = []
        for _ in range(size.turns):
            processes.anybody(False)  # begin together
            talked[0], started = 0.0, time.perf_counter()
            call()
            turns.append((time.perf_counter() - started, talked[0]))
        rows.append((method, *min(turns)))
    pd.DataFrame(rows, columns=["method", "seconds", "talking"]).to_csv(Path(folder) / f"{several}-{number}.csv")
    processes.leave()


def costs(size: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """The table: a row for each method."""
    found = []
    for several in (1, size.processes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(measure, (several, port, size, str(folder)), nprocs=several)
        found.append(pd.read_csv(folder / f"{several}-0.csv", index_col="method"))
    alone, together = found
    table = pd.DataFrame({"processes": size.processes, "batch": size.batch, "tokens": size.tokens}, index=alone.index)
    table["layers"], table["hidden"] = " ".join(map(str, size.layers)), size.hidden
    table["seconds alone"], table["seconds"] = alone["seconds"].round(4), together["seconds"].round(4)
    table["talking"] = (together["talking"] / together["seconds"]).round(3)
    table["speed-up"] = (alone["seconds"] / together["seconds"]).round(2)
    return table.reset_index()


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *ON_TEXT])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 3], help="the teacher's and the student's")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = costs(arguments, Path(folder))
    print(table.to_string(index=False))
    if arguments.write:
        table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
