"""Does MiniGLUE teach anything?  A linear bag of words against small BERTs, on the test split of every task.

    python benchmarks/miniglue_gap.py [task …]

The linear model sees the words of each text, the words that both have in common, and nothing of their order.  Its
regularisation is chosen on the validation split, as the checkpoint of the BERTs is.
"""

import argparse
import tempfile

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from kdlib import glue, metrics, miniglue, runs

STUDENTS = ("tiny-2x32", "tiny-2x64", "tiny-4x128")
SETTINGS = {"method": "fine_tune", "device": "cpu"}


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
    """The test metrics of the best linear model."""
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=miniglue.TASK_NAMES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--students", nargs="*", default=STUDENTS)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in arguments.tasks:
            data = glue.load("miniglue", task)
            rows.append({"task": task, "model": "bag of words", **bag_of_words(data)})
            for student in arguments.students:
                learning_rate = {"tiny-2x32": 2e-3, "tiny-2x64": 1e-3, "tiny-4x128": 5e-4}[student]
                for seed in range(arguments.seeds):
                    record = runs.run(
                        runs.configure(
                            task=task,
                            student=student,
                            seed=seed,
                            learning_rate=learning_rate,
                            output_dir=folder,
                            **SETTINGS,
                        )
                    )
                    scores = {name.split("/")[1]: v for name, v in record.metrics.items() if name.startswith("test")}
                    rows.append({"task": task, "model": student, **scores, "seconds": record.seconds})
                    print(rows[-1], flush=True)
            rows.append({"task": task, "model": "oracle", **oracle(data)})
    table = pd.DataFrame(rows).groupby(["task", "model"], sort=False).mean().round(3)
    print(table.to_string(na_rep=""))


if __name__ == "__main__":
    main()
