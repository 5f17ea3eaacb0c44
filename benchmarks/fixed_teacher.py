"""What does a teacher cost that does not learn?  kdlib, which asks it once, against transformers' Trainer.

    python benchmarks/fixed_teacher.py [--epochs 1 3] [--samples 320] [--batch 16] [--source FOLDER --task sst2]

Vanilla distillation of a teacher of six layers into a student of its first three, MiniLM's where its package is
installed and else random ones of that shape.  kdlib computes the teacher's logits of all texts first, on batches sorted
by length, and looks them up afterwards.  Trainer has a `compute_loss` that asks the teacher at every step, as is usual:
with dynamic padding, in its own random order or grouped by length as kdlib's batches are.  The rest is the same: texts,
batch size, number of steps, loss, fused AdamW with the same schedule and clipping, no evaluation, no checkpoint, no
logging.  The clock starts where the texts are tokenised and networks, optimiser and Trainer are made.

The texts are some of MiniGLUE's sentences, one to `--sentences` joined at random, so that lengths vary as they do
elsewhere; with --source and --task they are those of a data set as they are.

Beside the seconds stand the tokens that student and teacher were shown, padding included.  Ratios within one run are
what counts: the ways take turns, and the fastest turn of each is taken.  --write stores the table in
data/benchmarks/fixed_teacher.csv.
"""

import argparse
import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import datasets
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from benchmarks.influence import seconds
from kdlib import glue, models, trainer
from kdlib.batches import Encoded
from kdlib.learner import WARMUP_RATIO, WEIGHT_DECAY, accelerator_for, learner
from kdlib.methods.kd import KD, distillation
from kdlib.models import Outputs

KDLIB, GROUPED, RANDOM = "kdlib", "Trainer, grouped by length", "Trainer, random order"
LAYERS, RATE, SEED = 3, 1e-4, 0
SETTINGS = KD()
TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "fixed_teacher.csv"


class Shown:
    """Counts the tokens that networks are shown, padding included, by the names that they are given."""

    def __init__(self, **networks: nn.Module):
        self.tokens: Counter[str] = Counter()
        self.hooks = [
            network.register_forward_pre_hook(partial(self._count, name), with_kwargs=True)
            for name, network in networks.items()
        ]

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, name: str, _: nn.Module, __: tuple, arguments: Mapping[str, Tensor]) -> None:
        self.tokens[name] += arguments["input_ids"].numel()


class Distilling(Trainer):
    """Trainer with a teacher that answers every batch."""

    def __init__(self, *arguments, teacher: PreTrainedModel, **named):
        super().__init__(*arguments, **named)
        self.teacher = teacher.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean of the loss that kdlib's student has."""
        labels = inputs.pop("labels")
        with torch.no_grad():
            answers = Outputs(self.teacher(**inputs).logits)
        outputs = model(**inputs)
        loss = SETTINGS.loss(Outputs(outputs.logits), answers, labels).mean()
        return (loss, outputs) if return_outputs else loss


def joined_sentences(samples: int, most: int) -> tuple[datasets.Dataset, glue.Task]:
    """Texts of one to `most` of MiniGLUE's sentences, with the label of the first."""
    data, draw = glue.load("miniglue", "mini-sst2"), random.Random(SEED)
    (column,), rows = data.task.text_columns, data.train
    chosen = [draw.sample(range(len(rows)), draw.randint(1, most)) for _ in range(samples)]
    sentences, labels = rows[column][:], rows[data.task.label_column][:]
    return datasets.Dataset.from_dict(
        {
            column: [" ".join(sentences[i] for i in some) for some in chosen],
            data.task.label_column: [labels[some[0]] for some in chosen],
            data.task.row_column: list(range(samples)),
        }
    ), data.task


def networks(task: glue.Task, teacher: str = "") -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The student, the teacher and their tokenizer; `teacher` is a name of `models`, "" the one that is there."""
    try:
        name = teacher or (models.minilm_folder() and models.MINILM)
        tokenizer = models.load_tokenizer(name)
        network = models.load(name, task, tokenizer)
    except FileNotFoundError:
        tokenizer = models.load_tokenizer("tiny-6x384h12")
        torch.manual_seed(SEED)
        config = models.tiny_config("tiny-6x384h12", 30522, task.num_labels)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        network = BertForSequenceClassification._from_config(config, attn_implementation=models.FAST_ATTENTION)
        network.new_weights = ()
    return models.first_layers(network, min(LAYERS, network.config.num_hidden_layers)), network, tokenizer


Run = Callable[[], object]


def with_kdlib(student: PreTrainedModel, teacher: PreTrainedModel, encoded: Encoded, epochs: int, batch: int) -> Run:
    """A training that asks the teacher once, and then begins."""
    schedule = trainer.Schedule(epochs, batch, seed=SEED)
    accelerator = accelerator_for("cpu")
    who = learner("student", student, accelerator, RATE, schedule.total_steps(len(encoded)))

    def run() -> None:
        looked_up = trainer.teacher_logits(teacher, encoded, accelerator)
        step = distillation(who, lambda piece: Outputs(looked_up(piece)), SETTINGS)
        trainer.train(trainer.Training(step=step, learners=[who], data=encoded, schedule=schedule, evaluate=dict))

    return run


def with_trainer(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    epochs: int,
    batch: int,
    order: str,
) -> Run:
    """A training that asks the teacher at every step."""
    arguments = TrainingArguments(
        tempfile.gettempdir(),  # nothing is written
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        train_sampling_strategy=order,
        learning_rate=RATE,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_RATIO,  # below 1 it is a share
        seed=SEED,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorWithPadding(tokenizer)
    run = Distilling(student, arguments, collator, rows, processing_class=tokenizer, teacher=teacher)
    run.remove_callback(PrinterCallback)
    return run.train


def as_rows(encoded: Encoded) -> datasets.Dataset:
    """The same tokens as Trainer takes them."""
    cut = partial(torch.split, split_size_or_sections=encoded.lengths.tolist())
    ids, types = ([part.tolist() for part in cut(values)] for values in (encoded.input_ids, encoded.token_type_ids))
    masks = [[1] * len(part) for part in ids]
    columns = {"input_ids": ids, "token_type_ids": types, "attention_mask": masks, "labels": encoded.labels.tolist()}
    return datasets.Dataset.from_dict({**columns, "length": encoded.lengths.tolist()})


def costs(encoded: Encoded, pair: tuple, tokenizer: PreTrainedTokenizerBase, epochs: list[int], batch: int, turns: int):
    """The rows of the table."""
    (student, teacher), rows = pair, as_rows(encoded)
    made: dict[str, Callable[[PreTrainedModel, int], Run]] = {
        KDLIB: lambda fresh, count: with_kdlib(fresh, teacher, encoded, count, batch),
        GROUPED: lambda fresh, count: with_trainer(fresh, teacher, rows, tokenizer, count, batch, "group_by_length"),
        RANDOM: lambda fresh, count: with_trainer(fresh, teacher, rows, tokenizer, count, batch, "random"),
    }
    table = {}
    for _, count, way in product(range(turns), epochs, made):
        fresh = copy.deepcopy(student).train()
        run = made[way](fresh, count)
        with Shown(student=fresh, teacher=teacher) as shown:
            took = seconds(run, "cpu")
        row = table.setdefault((count, way), {"seconds": took})
        row["seconds"] = min(row["seconds"], took)
        row |= {f"{name}'s tokens": shown.tokens[name] for name in ("student", "teacher")}
    steps = -(-len(encoded) // batch)
    return [
        {"epochs": count, "batch": batch, "samples": len(encoded), "way": way, "steps": steps * count, **row}
        for (count, way), row in table.items()
    ]


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Costs with what Trainer's two orders take as multiples of kdlib's seconds for as many epochs."""
    table = pd.DataFrame(rows)
    floor = table[table.way == KDLIB].set_index("epochs")["seconds"]
    table["seconds / kdlib"] = table["seconds"] / floor.loc[table.epochs].to_numpy()
    return table.round({"seconds": 3, "seconds / kdlib": 2})


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a folder with data of your own; without it MiniGLUE's sentences are joined")
    parser.add_argument("--task", default="sst2", help="the task of --source")
    parser.add_argument("--teacher", default="", help="another network than MiniLM, by a name that `models` knows")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--sentences", type=int, default=6, help="joined at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.source is None:
        texts, task = joined_sentences(arguments.samples, arguments.sentences)
    else:
        data = glue.load(arguments.source, arguments.task, max_train=arguments.samples)
        texts, task = data.train, data.task
    student, teacher, tokenizer = networks(task, arguments.teacher)
    encoded = glue.encode(texts, task, tokenizer)
    lengths = encoded.lengths.double()
    print(f"{len(encoded)} texts of {lengths.mean():.0f} ± {lengths.std():.0f} word pieces")
    table = tidy(costs(encoded, (student, teacher), tokenizer, arguments.epochs, arguments.batch, arguments.turns))
    print(table.to_string(index=False))
    if arguments.write:
        table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
