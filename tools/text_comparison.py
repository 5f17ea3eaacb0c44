"""`python -m tools.text_comparison TEXT GLUE`: Tutor-KD and soft labels on real text, for chapter 11.

TEXT is a local copy of a corpus in the hub's layout (wikisplit's sentences, splits tune and test), GLUE one of
`nyu-mll/glue`.  MiniLM comes without a masked-language-model head, and as a network for whole sentences; so it is first
trained as a masked language model, all of it: a head alone learned little more than how frequent the words are.  Then
small students are distilled for equally many steps and fine-tuned on 2,000 sentences of SST-2; the paper leaves
attention out for two layers, and so do we.  Records go to data/runs/11_pretraining.

The command can be stopped at any time: what has a record is skipped, an interrupted run goes on where it was.
"""

import argparse
import dataclasses
import itertools
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

from kdlib import engine, models, pretraining, runs
from kdlib.runs import RunRecord
from tools.experiments import RECORDS, ROOT, keep

CHAPTER = "11_pretraining"
WORK = ROOT / "_build" / "text_comparison"
CORPUS, HUB, STUDENT, SEEDS = "wikisplit", "nyu-mll/glue", "tutor-5.7m", range(3)
TEXT = {"train_split": "tune+test", "max_length": 64, "batch_size": 32}
HEAD = {"method": "mlm", "student": models.MINILM, "steps": 500, "learning_rate": 5e-4, "evaluate_every": 250}
DISTILLED = {"student": STUDENT, "steps": 200, "learning_rate": 1e-3, "evaluate_every": 200}
WAYS: dict[str, dict[str, Any]] = {
    "tutor": {"method": "tutor", "attention": False},
    "soft_labels": {"method": "soft_labels"},
}
PLAIN = {"device": "cpu", "output_dir": str(WORK), "checkpoint_every": 50}
FINE_TUNED = {
    "task": "sst2",
    "method": "fine_tune",
    "max_train": 2000,
    "epochs": 3,
    "learning_rate": 5e-4,
    "predict_test": False,
    "evaluate_every": 10_000,
}


def has_record(name: str) -> bool:
    """Whether something is recorded under this name."""
    return (RECORDS / CHAPTER / f"{name}.json").exists()


def keep_as(record: RunRecord, name: str, names: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
    """Keep a record under a name of its own, with `names` in the place of this machine's folders."""
    config, told = {**record.config, **names}, {**record.metrics, **(metrics or {})}
    config |= {"cache_dir": None} if "cache_dir" in config else {}
    keep(dataclasses.replace(record, run_id=name, config=config, metrics=told), CHAPTER)


def teacher(text: str) -> str:
    """MiniLM with a head that was trained on the text: its folder."""
    record = pretraining.run(pretraining.configure(corpus=text, **TEXT, **HEAD, **PLAIN))
    if not has_record("teacher"):
        keep_as(record, "teacher", {"corpus": CORPUS})
    return str(record.folder / engine.STUDENT)


def fine_tune(student: str, seed: int, glue: str) -> RunRecord:
    """A student on SST-2, evaluated once, at the end."""
    config = runs.configure(source=glue, student=student, seed=seed, **FINE_TUNED, **PLAIN)
    return runs.run(config)


def make(way: str, seed: int, text: str, glue: str) -> str:
    """Distil, fine-tune, keep the record; return a line about it."""
    name = f"{way}-seed{seed}"
    settings = {"corpus": text, "teacher": teacher(text), "seed": seed, **TEXT, **DISTILLED, **PLAIN}
    record = pretraining.run(pretraining.configure(**settings, **WAYS[way]))
    score = fine_tune(str(record.folder / engine.STUDENT), seed, glue).metrics["validation/accuracy"]
    keep_as(record, name, {"corpus": CORPUS, "teacher": "teacher"}, {"sst2/accuracy": score})
    return f"{name}  {record.seconds:.0f} s  sst2 {score:.3f}  {record.metrics}"


def make_plain(seed: int, glue: str) -> str:
    """The same student without distillation."""
    folder, tokenizer = WORK / f"fresh-seed{seed}", models.load_tokenizer(models.MINILM)
    engine.save_pretrained(models.load_masked(STUDENT, tokenizer, seed).base_model, tokenizer, folder)
    record = fine_tune(str(folder), seed, glue)
    score = {"sst2/accuracy": record.metrics["validation/accuracy"]}
    keep_as(record, f"none-seed{seed}", {"source": HUB, "student": STUDENT}, score)
    return f"none-seed{seed}  {record.seconds:.0f} s  sst2 {score['sst2/accuracy']:.3f}"


def main() -> None:
    """Make the records that are missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a local copy of the corpus")
    parser.add_argument("glue", help="a local copy of nyu-mll/glue, or that id")
    arguments = parser.parse_args()
    for seed, way in itertools.product(SEEDS, ("none", *WAYS)):
        if not has_record(f"{way}-seed{seed}"):
            plain = way == "none"
            print(
                make_plain(seed, arguments.glue) if plain else make(way, seed, arguments.text, arguments.glue),
                flush=True,
            )


if __name__ == "__main__":
    main()
