"""Does MiniGLUE teach anything?  A linear bag of words against small BERTs, on the test split of every task.

    python benchmarks/miniglue_gap.py [task …] [--write]

The linear model sees the words of each text, the words that both have in common, and nothing of their order.  Its
regularisation is chosen on the validation split, as the checkpoint of the BERTs is.  All BERTs train from scratch for
the same number of epochs.  --write puts the table into the data card.  Finished runs are kept in _build/gap.
"""

import argparse
import os
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from kdlib import glue, metrics, miniglue, runs

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "data" / "miniglue" / "README.md"
START, END = "<!-- benchmarks/miniglue_gap.py writes this table -->", "<!-- end of the table -->"
RATES = {"tiny-2x32": 2e-3, "tiny-2x64": 1e-3}
"""The networks and their learning rates."""
EPOCHS = 12


def words(texts: tuple[str, ...]) -> dict[str, int]:
    """Counts of each text's words, and which words the two texts share."""
    counts: dict[str, int] = {}
    for number, text in enumerate(texts):
        for word in text.split():
            counts[f"{number} {word}"] = counts.get(f"{number} {word}", 0) + 1
    if len(texts) == 2:
        shared = set(texts[0].split()) & set(texts[1].split())
        counts |= {f"both {word}": 1 for word in shared} | {"shared": len(shared)}
    return counts


def bag_of_words(data: glue.TaskData) -> dict[str, float]:
    """The test metrics of the linear model that is best on validation."""
    splits = {"train": data.train, **data.evaluation, **data.test}
    columns = data.task.text_columns
    texts = {name: list(zip(*(split[c][:] for c in columns), strict=True)) for name, split in splits.items()}
    labels = {name: np.array(split["label"][:]) for name, split in splits.items()}
    vectorizer = DictVectorizer().fit(words(t) for t in texts["train"])
    features = {name: csr_matrix(vectorizer.transform(words(t) for t in texts[name])) for name in texts}

    def scores(model, split: str) -> dict[str, float]:
        if data.task.is_regression:
            outputs = model.predict(features[split])[:, None]
        else:
            outputs = np.eye(data.task.num_labels)[model.predict(features[split])]
        return metrics.compute(data.task.metrics, outputs, labels[split])

    candidates = []
    for strength in (0.01, 0.03, 0.1, 0.3, 1.0):
        model = Ridge(alpha=1 / strength) if data.task.is_regression else LogisticRegression(C=strength, max_iter=3000)
        candidates.append(model.fit(features["train"], labels["train"]))
    best = max(candidates, key=lambda model: scores(model, "validation")[data.task.metrics[0]])
    return scores(best, "test")


def oracle(data: glue.TaskData) -> dict[str, float]:
    """The test metrics of the true posterior's best guess."""
    posterior = np.array(data.test["test"]["posterior"][:])
    outputs = posterior[:, :1] if data.task.is_regression else posterior
    return metrics.compute(data.task.metrics, outputs, np.array(data.test["test"]["label"][:]))


def networks(task: str, seeds: int) -> list[runs.RunConfig]:
    """One run for each network and seed."""
    settings = {"method": "fine_tune", "device": "cpu", "epochs": EPOCHS, "output_dir": str(ROOT / "_build" / "gap")}
    return [
        runs.configure(task=task, student=student, learning_rate=rate, seed=seed, **settings)
        for student, rate in RATES.items()
        for seed in range(seeds)
    ]


def table(scores: pd.DataFrame) -> str:
    """Mean ± standard deviation in per cent, one row a task and metric, as Markdown."""
    models = ["bag of words", *RATES, "oracle"]
    lines = ["| task | metric | " + " | ".join(models) + " |", "|---|---|" + "---:|" * len(models)]
    for (task, metric), rows in scores.groupby(["task", "metric"], sort=False):
        cells = []
        for model in models:
            values = 100 * rows.loc[rows["model"] == model, "value"]
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between the marks in the data card."""
    card = CARD.read_text()
    before, after = card[: card.index(START) + len(START)], card[card.index(END) :]
    CARD.write_text(f"{before}\n{text}\n{after}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=miniglue.TASK_NAMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--write", action="store_true", help="write the table into the data card")
    arguments = parser.parse_args()
    configs = [config for task in arguments.tasks for config in networks(task, arguments.seeds)]
    with get_context("spawn").Pool(arguments.processes) as pool:
        for record in pool.imap_unordered(runs.run, configs):
            print(record.run_id, record.config["student"], f"{record.seconds:.0f} s", flush=True)
        pool.close()
        pool.join()
    rows = []
    for task in arguments.tasks:
        data = glue.load("miniglue", task)
        scores = [("bag of words", bag_of_words(data)), ("oracle", oracle(data))]
        for config in networks(task, arguments.seeds):
            metrics_of = runs.read_record(config.folder).metrics
            scores.append((config.student, {name: metrics_of[f"test/{name}"] for name in data.task.metrics}))
        rows += [(task, metric, model, value) for model, values in scores for metric, value in values.items()]
    text = table(pd.DataFrame(rows, columns=["task", "metric", "model", "value"]))
    print(text)
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
