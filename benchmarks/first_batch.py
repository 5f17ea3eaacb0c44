"""How long does a run take to get going?  Seconds from the start of the process to the first optimiser step.

    python benchmarks/first_batch.py [--task mini-sst2] [--teacher book-teacher] [--student tiny-2x64] [--turns 3]

Each turn is a process of its own that does what a run with a fixed teacher does, in the same order; the first is thrown
away, so that all files are in the memory of the machine.  For each part the fastest turn is taken.  The imports are
those of `kdlib.runs`, split by what costs most: what one part has imported does not count again in the next.
--write stores the table in data/benchmarks/first_batch.csv.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "data" / "benchmarks" / "first_batch.csv"
TOTAL = "all"
PARTS = (
    "Python and torch",
    "transformers",
    "datasets and pandas",
    "the rest of kdlib.runs",
    "loading the data",
    "networks",
    "tokenising",
    "the teacher's logits",
    "the first step",
)
RUN = """
import json, sys, time
marks = [float(sys.argv[1])]
mark = lambda: marks.append(time.time())
import torch
mark()
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedModel
mark()
import datasets
mark()
from kdlib import glue, models, runs, trainer
from kdlib.learner import accelerator_for, learner
from kdlib.methods.base import Cast
from kdlib.models import Outputs
mark()
config = runs.configure(**json.loads(sys.argv[2]))
data = runs.load_data(config)
mark()
tokenizer = models.load_tokenizer(config.student)
networks = [models.load(name, data.task, tokenizer) for name in (config.student, config.teacher)]
mark()
encoded = [glue.encode(split, data.task, tokenizer) for split in (data.train, *data.evaluation.values())]
mark()
accelerator = accelerator_for("cpu")
looked_up = trainer.teacher_logits(networks[1], encoded[0], accelerator)
mark()
student = learner("student", networks[0].train(), accelerator, config.learning_rate, 100)
step = config.settings.step(Cast(student, answers=lambda batch: Outputs(looked_up(batch))))
step(trainer.training_batch(encoded[0], list(range(config.batch_size)), accelerator.device))
mark()
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""


def seconds_of_a_run(parameters: dict[str, object]) -> list[float]:
    """The seconds of each of PARTS, in a new process."""
    command = [sys.executable, "-c", RUN, str(time.time()), json.dumps(parameters)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def tidy(turns: list[list[float]]) -> pd.DataFrame:
    """The fastest turn of each part, their sum, and their shares of it."""
    fastest = [min(times) for times in zip(*turns, strict=True)]
    table = pd.DataFrame({"part": [*PARTS, TOTAL], "seconds": [*fastest, sum(fastest)]})
    table["share"] = table["seconds"] / sum(fastest)
    return table.round({"seconds": 2, "share": 3})


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mini-sst2")
    parser.add_argument("--teacher", default="book-teacher")
    parser.add_argument("--student", default="tiny-2x64")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    parameters = {"task": arguments.task, "teacher": arguments.teacher, "student": arguments.student}
    seconds_of_a_run(parameters)
    table = tidy([seconds_of_a_run(parameters) for _ in range(arguments.turns)])
    print(table.to_string(index=False))
    if arguments.write:
        table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
