import json
import os
import shutil
import socket
from collections import Counter
from dataclasses import replace
from itertools import chain

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from kdlib import corpus, glue, miniglue
from kdlib.batches import collate

REVIEWS = glue.generic_task("reviews", "text", ("bad", "good"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever opens a connection fails, here and in the libraries."""

    def refuse(*_, **__):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


def write(folder, split, rows, kind="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def reviews(folder, train=None, validation=None, kind="jsonl"):
    """A folder with ten reviews to train on and four to validate, or the rows given."""
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(10)]
    write(folder, "train", train or rows, kind)
    write(folder, "validation", validation or rows[:4], kind)
    return folder


def sst2(folder, test_label=-1, **changes):
    """A copy of the hub's layout with a README that declares configuration, label names and row counts."""
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    sizes = {"train": 6, "validation": 3, "test": 2}
    for split, size in sizes.items():
        labels = [test_label] * size if split == "test" else [i % 2 for i in range(size)]
        rows = {"sentence": [f"sentence {i} " for i in range(size)], "label": labels}
        (folder / "sst2").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features).to_parquet(folder / f"sst2/{split}-00000-of-00001.parquet")
    sizes |= changes
    splits = "".join(f"  - name: {split}\n    num_bytes: 1\n    num_examples: {n}\n" for split, n in sizes.items())
    files = "".join(f"  - split: {split}\n    path: sst2/{split}-*\n" for split in sizes)
    (folder / "README.md").write_text(
        "---\ndataset_info:\n- config_name: sst2\n  features:\n  - name: sentence\n    dtype: string\n  - name: label\n"
        f"    dtype:\n      class_label:\n        names:\n          '0': negative\n          '1': positive\n"
        f"  splits:\n{splits}"
        f"configs:\n- config_name: sst2\n  data_files:\n{files}---\n\n# A mirror\n"
    )
    return folder


# Tasks


def test_the_table_has_the_nine_glue_tasks_and_the_embedded_four():
    nine = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    assert set(glue.TASKS) == nine | set(miniglue.TASK_NAMES)
    assert {name for name, task in glue.TASKS.items() if task.is_regression} == {"stsb", "mini-stsb"}
    assert {name: task.num_labels for name, task in glue.TASKS.items() if task.num_labels != 2} == {
        "mnli": 3, "mini-mnli": 3, "stsb": 1, "mini-stsb": 1,
    }  # fmt: skip
    assert glue.TASKS["mnli"].evaluation_splits == ("validation_matched", "validation_mismatched")
    assert glue.TASKS["mrpc"].metrics[0] == glue.TASKS["qqp"].metrics[0] == "f1"
    assert glue.TASKS["cola"].metrics == ("matthews_correlation",)
    assert glue.task_for("rte").label_names == ("entailment", "not_entailment")


@pytest.mark.parametrize(("wrong", "near"), [("sst-2", "'sst2'"), ("MNLI", "'mnli'"), ("mini_mrpc", "'mini-mrpc'")])
def test_an_unknown_task_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"unknown task '{wrong}'.*did you mean .*{near}.*The tasks are cola"):
        glue.load("miniglue", wrong)


def test_a_generic_task_is_checked():
    with pytest.raises(ValueError, match="one or two"):
        glue.generic_task("x", ("a", "b", "c"))
    with pytest.raises(ValueError, match="two or more classes"):
        glue.generic_task("x", "a", ["only"])
    with pytest.raises(ValueError, match="different names"):
        glue.generic_task("x", "a", ["same", "same"])
    with pytest.raises(ValueError, match="use the task that load returns"):
        _ = glue.generic_task("x", "a").num_labels
    assert glue.generic_task("x", "a", ()).metrics == ("pearson", "spearmanr")


# Sources


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [("sst2", 67349, 872, 1821), ("mrpc", 3668, 408, 1725), ("stsb", 5749, 1500, 1379), ("rte", 2490, 277, 3000)],
)
def test_the_real_mirror(shared, name, train, validation, test):
    data = glue.load(shared / "glue", name)
    assert (len(data.train), len(data.evaluation["validation"]), len(data.test["test"])) == (train, validation, test)
    assert data.train["row"][:] == list(range(train))
    assert set(data.train.column_names) == {*data.task.text_columns, "label", "row"}
    labels = np.array(data.train["label"][:])
    assert (labels.min(), labels.max()) == (0, 5 if name == "stsb" else 1)
    hidden = set(data.test["test"]["label"])
    assert hidden == ({0, 1} if name == "mrpc" else {-1})


@pytest.mark.parametrize("name", miniglue.TASK_NAMES)
def test_the_embedded_tasks(name):
    data = glue.load("miniglue", name, feedback_fraction=0.1)
    assert {"posterior", "difficulty", "flipped", "row"} <= set(data.train.column_names)
    assert len(data.feedback) == round(0.1 * (len(data.train) + len(data.feedback)))
    assert len(data.evaluation["validation"]) > 0 and len(data.test["test"]) > 0
    assert data.task == glue.TASKS[name]


def test_miniglue_has_no_glue_tasks():
    with pytest.raises(ValueError, match="'rte' is not part of 'miniglue', which has mini-sst2"):
        glue.load("miniglue", "rte")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("place", ["", "reviews"])
def test_a_bare_folder(tmp_path, kind, place):
    reviews(tmp_path / "my [own] data" / place, kind=kind)
    data = glue.load(tmp_path / "my [own] data", replace(REVIEWS, config="reviews"))
    assert data.train.to_dict() == {
        "text": [f"text {i}" for i in range(10)], "label": [0, 1] * 5, "row": list(range(10)),
    }  # fmt: skip
    assert data.train.features["label"].names == ["bad", "good"]
    assert list(data.evaluation) == ["validation"] and data.test == {} and data.feedback is None


def test_a_folder_in_the_hub_layout_without_a_readme_is_left_to_datasets(tmp_path):
    reviews(tmp_path / "data")
    (tmp_path / "README.md").write_text("# Just a title\n")
    assert len(glue.load(str(tmp_path), REVIEWS).train) == 10


def test_several_files_of_a_split_are_read_in_order(tmp_path):
    for shard in (1, 0):
        write(tmp_path, f"train-0000{shard}-of-00002", [{"text": f"shard {shard}", "label": shard}])
    write(tmp_path, "validation", [{"text": "x", "label": 1}])
    write(tmp_path, "train-old", [{"text": "a leftover", "label": 0}])
    assert glue.load(tmp_path, REVIEWS).train["text"][:] == ["shard 0", "shard 1"]
    (tmp_path / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"split 'train' in .* has 1 of 2 files.*copy it again"):
        glue.load(tmp_path, REVIEWS)
    write(tmp_path, "train", [{"text": "x", "label": 1}], "csv")
    with pytest.raises(ValueError, match=r"several kinds.*train.csv"):
        glue.load(tmp_path, REVIEWS)


def test_two_columns_and_a_score(tmp_path):
    rows = [{"left": "a", "right": "b", "score": 0.5}, {"left": "c", "right": "d", "score": 3}]
    reviews(tmp_path, rows, rows, "csv")
    task = glue.generic_task("pairs", ("left", "right"), (), label_column="score")
    data = glue.load(tmp_path, task)
    assert data.train["score"][:] == [0.5, 3.0]
    assert data.train.features["score"] == Value("float32")


def test_csv_text_stays_text(tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(["null", "17", "NA", 'with "quotes", commas'])]
    data = glue.load(reviews(tmp_path, rows, kind="csv"), REVIEWS)
    assert data.train["text"][:] == ["null", "17", "NA", 'with "quotes", commas']
    all_digits = [{"text": "007", "label": 0}, {"text": "1", "label": 1}]
    data = glue.load(reviews(tmp_path / "digits", all_digits, kind="csv"), REVIEWS)
    assert data.train["text"][:] == ["007", "1"]
    numbers = [{"text": 1, "label": 0}, {"text": 2, "label": 1}]
    with pytest.raises(ValueError, match=r"column 'text' of split 'train' holds 1 \(int\) in row 0; expected text"):
        glue.load(reviews(tmp_path / "json", numbers), REVIEWS)


def test_a_changed_file_is_read_anew(tmp_path):
    reviews(tmp_path)
    before = glue.load(tmp_path, REVIEWS).train["text"][0]
    path = tmp_path / "train.jsonl"
    stamp = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("text 0", "TEXT 0"))
    os.utime(path, ns=(stamp, stamp))  # same size and same time, as after rsync
    assert (before, glue.load(tmp_path, REVIEWS).train["text"][0]) == ("text 0", "TEXT 0")


def test_nothing_is_left_in_the_cache(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
    bars_were_off = datasets.are_progress_bars_disabled()
    glue.load(reviews(tmp_path / "data"), REVIEWS)
    glue.load(sst2(tmp_path / "mirror"), "sst2")
    assert not (tmp_path / "cache").exists()
    assert datasets.are_progress_bars_disabled() == bars_were_off


def test_the_readme_counts_and_names(tmp_path):
    data = glue.load(sst2(tmp_path), "sst2")
    assert data.test["test"]["label"][:] == [-1, -1]
    assert data.train["sentence"][0] == "sentence 0 "
    with pytest.raises(ValueError, match=r"no configuration 'cola' for task 'cola'.*Available: \['sst2'\]"):
        glue.load(tmp_path, "cola")
    inferred = glue.load(tmp_path, glue.generic_task("mine", "sentence", config="sst2"))
    assert inferred.task.label_names == ("negative", "positive")


def test_class_names_from_the_readme_also_hold_for_plain_numbers(tmp_path):
    sst2(tmp_path)
    for file in list((tmp_path / "sst2").glob("*.parquet")):
        rows = pd.read_parquet(file)
        file.with_name(file.name.split("-")[0] + ".jsonl").write_text(rows.to_json(orient="records", lines=True))
        file.unlink()
    mine = glue.generic_task("mine", "sentence", config="sst2")
    assert glue.load(tmp_path, mine).task.label_names == ("negative", "positive")
    path = tmp_path / "sst2/train.jsonl"
    path.write_text(path.read_text().replace('"label":1', '"label":2'))
    with pytest.raises(ValueError, match="label 2 in row 1 of split 'train'"):
        glue.load(tmp_path, mine)


# Damage


def test_a_missing_folder(tmp_path):
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "../a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            glue.load(source, "sst2")
    with pytest.raises(FileNotFoundError, match="holds no data files for task 'reviews'"):
        glue.load(tmp_path, REVIEWS)


def test_a_truncated_parquet_file(tmp_path):
    path = sst2(tmp_path) / "sst2/train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        OSError, match=r"train-00000-of-00001.parquet is empty or cut short \(500 bytes\).*copy it again"
    ):
        glue.load(tmp_path, "sst2")
    path.write_bytes(b"")
    with pytest.raises(OSError, match="0 bytes"):
        glue.load(tmp_path, "sst2")
    path.write_bytes(b"PAR1" + b"x" * 500 + b"PAR1")
    with pytest.raises(OSError, match=r"cannot read .*train-00000-of-00001.parquet.*copy it again"):
        glue.load(tmp_path, "sst2")


def test_a_git_lfs_pointer(tmp_path):
    path = sst2(tmp_path) / "sst2/test-00000-of-00001.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(OSError, match=r"Git LFS pointer.*git lfs pull"):
        glue.load(tmp_path, "sst2")


def test_a_missing_file_of_a_split(tmp_path):
    (sst2(tmp_path) / "sst2/test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of split 'test'.*copy it again"):
        glue.load(tmp_path, "sst2")


def test_a_layout_of_its_own_is_read_by_its_readme(tmp_path):
    for name in ("first", "second"):
        for split in ("train", "validation"):
            write(tmp_path / "files", f"{name}.{split}", [{"text": name, "label": 0}, {"text": name, "label": 1}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: files/{name}.train*\n"
        f"  - split: validation\n    path: files/{name}.validation*\n"
        for name in ("first", "second")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert glue.load(tmp_path, replace(REVIEWS, config="second")).train["text"][:] == ["second", "second"]
    with pytest.raises(ValueError, match=r"no configuration None .*'first', 'second'"):
        glue.load(tmp_path, REVIEWS)
    (tmp_path / "files/second.validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of split 'validation'.*copy it again"):
        glue.load(tmp_path, replace(REVIEWS, config="second"))


def test_fewer_rows_than_the_readme_promises(tmp_path):
    with pytest.raises(OSError, match=r"split 'train' .* has 6 rows, its README.md promises 7"):
        glue.load(sst2(tmp_path, train=7), "sst2")


def test_a_line_cut_in_half(tmp_path):
    path = reviews(tmp_path) / "train.jsonl"
    path.write_text(path.read_text()[:-8])
    with pytest.raises(OSError, match=r"train.jsonl is cut short in line 10 .*copy the file again"):
        glue.load(tmp_path, REVIEWS)
    path.write_text("")
    with pytest.raises(OSError, match=r"train.jsonl is empty \(0 bytes\)"):
        glue.load(tmp_path, REVIEWS)


def test_the_real_mirror_half_copied(shared, tmp_path):
    shutil.copytree(shared / "glue", tmp_path / "glue", ignore=shutil.ignore_patterns("sst2"))
    assert len(glue.load(tmp_path / "glue", "rte").train) == 2490
    with pytest.raises(FileNotFoundError, match=r"no data files for task 'sst2'|no file of split 'train'"):
        glue.load(tmp_path / "glue", "sst2")


# The hub


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"cannot get data set 'nobody/no-such-set'.*local folder.*'miniglue'"):
        glue.load("nobody/no-such-set", "rte")


def test_a_hub_id_is_loaded_by_name_and_trusts_no_code(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        rows = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]})
        return datasets.DatasetDict(train=rows, validation=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(glue.load("nyu-mll/glue", "rte").train) == 2
    assert calls == [(("nyu-mll/glue", "rte"), {})]

    def wrong_configuration(*_):
        raise ValueError("BuilderConfig 'rte' not found. Available: ['plain']")

    monkeypatch.setattr(datasets, "load_dataset", wrong_configuration)
    with pytest.raises(
        ValueError, match=r"cannot read 'nyu-mll/glue' from the hub with configuration 'rte'.*\['plain'\]"
    ):
        glue.load("nyu-mll/glue", "rte")


# Checks of the rows


def test_a_missing_split(tmp_path):
    reviews(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"no split 'test' for task 'reviews', it has train, validation.*predict_test=False.*generic_task",
    ):
        glue.load(tmp_path, replace(REVIEWS, test_splits=("test",)))


def test_a_split_without_rows(tmp_path):
    reviews(tmp_path, kind="csv")
    (tmp_path / "validation.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"validation.csv has no rows, only the names of its columns"):
        glue.load(tmp_path, REVIEWS)


def test_a_missing_column(tmp_path):
    reviews(tmp_path)
    with pytest.raises(ValueError, match=r"split 'train' .* has no column 'review'; it has text, label"):
        glue.load(tmp_path, replace(REVIEWS, text_columns=("review",)))
    with pytest.raises(ValueError, match="no column 'stars'"):
        glue.load(tmp_path, replace(REVIEWS, label_column="stars"))


@pytest.mark.parametrize("empty", ["", " \t\n", "\u00a0", None])
def test_an_empty_text(tmp_path, empty):
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 1}, {"text": empty, "label": 1}]
    with pytest.raises(ValueError, match=r"empty text in column 'text', row 2 of split 'validation' .*1 such rows"):
        glue.load(reviews(tmp_path, validation=rows), REVIEWS)
    lenient = replace(REVIEWS, allow_empty_text=True)
    if empty is None:
        with pytest.raises(ValueError, match="row 2"):
            glue.load(tmp_path, lenient)
    else:
        assert glue.load(tmp_path, lenient).evaluation["validation"]["text"][2] == empty


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "label 2.* in row 2 of split 'train'.*expected a class number, 0 … 1"),
        ([0, -1, 1], "label -1.* in row 1"),
        ([0, 1, None], "label in row 2 of split 'train' .*is missing"),
        ([0.0, 0.5, 1.0], "label 0.5 in row 1"),
        (["good", "bad", "ugly"], "label 'ugly' in row 2 .*expected one of bad, good"),
        (["0", "1", "0"], "label '0' in row 0 .*3 such rows.*expected one of bad, good"),
        (["good", None, "bad"], "label in row 1 .*is missing"),
    ],
)
def test_a_label_out_of_range(tmp_path, labels, message):
    rows = [{"text": "x", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        glue.load(reviews(tmp_path, rows), REVIEWS)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, float("nan"), 5.0], "label in row 1 of split 'train'.*is missing"),
        ([0.0, 2.0, 5.1], "label 5.1 in row 2"),
        ([0.0, -1.0, 5.0], "label -1.0 in row 1"),
        (["1", "2", "much"], "label 'much' in row 2"),
    ],
)
def test_a_score_out_of_range(tmp_path, scores, message):
    task = replace(glue.generic_task("scores", "text", ()), score_range=(0.0, 5.0))
    write(tmp_path, "train", [{"text": "x", "label": score} for score in scores])
    write(tmp_path, "validation", [{"text": "x", "label": 1.0}])
    with pytest.raises(ValueError, match=message):
        glue.load(tmp_path, task)
    if "5.1" in message:
        assert glue.load(tmp_path, replace(task, score_range=None)).train["label"][2] == pytest.approx(5.1)


def test_an_infinite_score(tmp_path):
    write(tmp_path, "train", [{"text": "x", "label": score} for score in ("1.5", "inf")], "csv")
    write(tmp_path, "validation", [{"text": "x", "label": 1.0}])
    with pytest.raises(ValueError, match=r"label 'inf' in row 1 .*expected a finite score"):
        glue.load(tmp_path, glue.generic_task("scores", "text", ()))


@pytest.mark.parametrize("test_rows", [[{"text": "x"}], [{"text": "x", "label": -1}], [{"text": "x", "label": None}]])
def test_labels_of_a_test_split_may_be_hidden(tmp_path, test_rows):
    write(reviews(tmp_path), "test", test_rows)
    data = glue.load(tmp_path, replace(REVIEWS, test_splits=("test",)))
    assert data.test["test"]["label"][:] == [-1]
    write(tmp_path, "test", [{"text": "x", "label": 7}])
    with pytest.raises(ValueError, match=r"label 7.* in row 0 of split 'test'"):
        glue.load(tmp_path, replace(REVIEWS, test_splits=("test",)))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["f", "b", "c", "e", "d", "a", "b"], tuple("abcdef"), [5, 1, 2, 4, 3, 0, 1]),
        ([0, 2, 1, 0], ("0", "1", "2"), [0, 2, 1, 0]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
    ],
)
def test_label_names_are_read_from_the_data(tmp_path, labels, names, numbers):
    rows = [{"text": "x", "label": label} for label in labels]
    data = glue.load(reviews(tmp_path, rows, rows[:2]), glue.generic_task("mine", "text"))
    assert data.task.label_names == names
    assert data.train["label"][:] == numbers
    assert data.evaluation["validation"]["label"][:] == numbers[:2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.5], "holds 0.5 in row 0, which is a score and no class: set regression=True"),
        ([0, 0], "one class only"),
        (["a", "a"], "one class only"),
    ],
)
def test_label_names_that_cannot_be_read(tmp_path, labels, message):
    rows = [{"text": "x", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        glue.load(reviews(tmp_path, rows), glue.generic_task("mine", "text"))
    with pytest.raises(ValueError, match="'stars', which is missing; the columns are text, label"):
        glue.load(tmp_path, glue.generic_task("mine", "text", label_column="stars"))


def test_class_names_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"classes negative, positive, but .* expects the classes positive, negative"):
        glue.load(sst2(tmp_path), replace(glue.TASKS["sst2"], label_names=("positive", "negative")))
    with pytest.raises(ValueError, match="expects a score"):
        glue.load(tmp_path, replace(glue.TASKS["sst2"], label_names=(), metrics=("pearson",)))


# Limits and the feedback split


def test_limits_are_seeded_and_nested(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2, "row": "mine"} for i in range(50)]
    write(reviews(tmp_path, rows, rows), "test", rows)
    task = replace(REVIEWS, test_splits=("test",))
    ten = glue.load(tmp_path, task, max_train=10, max_evaluation=7)
    assert (len(ten.train), len(ten.evaluation["validation"]), len(ten.test["test"])) == (10, 7, 50)
    assert [f"text {row}" for row in ten.train["row"]] == ten.train["text"][:]
    assert glue.load(tmp_path, task, max_train=10).train["row"][:] == ten.train["row"][:]
    assert glue.load(tmp_path, task, max_train=10, seed=1).train["row"][:] != ten.train["row"][:]
    assert set(ten.train["row"]) < set(glue.load(tmp_path, task, max_train=20).train["row"])
    assert len(glue.load(tmp_path, task, max_train=999).train) == 50
    with pytest.raises(ValueError, match="max_train is 0"):
        glue.load(tmp_path, task, max_train=0)
    with pytest.raises(ValueError, match="max_evaluation is -1"):
        glue.load(tmp_path, task, max_evaluation=-1)


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 2), min_size=4, max_size=200),
    st.floats(0.05, 0.95),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_the_feedback_split_is_disjoint_complete_and_stratified(labels, fraction, seed, scores):
    values = np.linspace(0, 5, len(labels)).astype(np.float32) if scores else np.array(labels)
    train = Dataset.from_dict({"label": values, "row": np.arange(len(labels))})
    size = round(fraction * len(labels))
    if not 0 < size < len(labels):
        with pytest.raises(ValueError, match="choose a fraction"):
            glue.feedback_split(train, fraction, seed)
        return
    rest, feedback = glue.feedback_split(train, fraction, seed)
    assert len(feedback) == size
    assert sorted([*rest["row"], *feedback["row"]]) == list(range(len(labels)))
    strata = (np.arange(len(labels)) * 5 // len(labels)).tolist() if scores else labels
    taken = Counter(strata[row] for row in feedback["row"])
    for stratum, count in Counter(strata).items():
        assert abs(taken[stratum] - count * size / len(labels)) < (2 if scores else 1)


def test_the_feedback_split_follows_its_seed(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(200)]
    reviews(tmp_path, rows)
    splits = [glue.load(tmp_path, REVIEWS, feedback_fraction=0.1, seed=seed) for seed in (0, 0, 1)]
    taken = [data.feedback["row"][:] for data in splits]
    assert taken[0] == taken[1] != taken[2]
    # Every row has its chance, also the first and the last.
    seen = Counter(row for seed in range(100) for row in glue.feedback_split(splits[0].train, 0.1, seed)[1]["row"])
    assert len(seen) == 180 and max(seen.values()) < 25


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0, -0.5, 1.5])
def test_an_empty_feedback_split(fraction):
    train = Dataset.from_dict({"label": [0, 1] * 5})
    with pytest.raises(ValueError, match=f"a feedback split of {fraction} of 10 training rows"):
        glue.feedback_split(train, fraction)


# Tokens and batches

PAIRS = glue.generic_task("pairs", ("first", "second"), ("no", "yes"))


def encoded_pairs(tokenizer, size=7, max_length=12):
    rows = {
        "first": ["a " * (i % 4 + 1) for i in range(size)],
        "second": ["b c " * (i % 3 + 1) for i in range(size)],
        "label": [i % 2 for i in range(size)],
        "row": list(range(10, 10 + size)),
    }
    return rows, glue.encode(Dataset.from_dict(rows), PAIRS, tokenizer, max_length)


def test_long_texts_are_cut(tokenizer):
    _, encoded = encoded_pairs(tokenizer, max_length=5)
    assert set(encoded.lengths.tolist()) == {5}
    with pytest.raises(ValueError, match="max_length is 4; 3 special tokens leave no room"):
        encoded_pairs(tokenizer, max_length=4)


def test_scores_and_more_rows_than_one_chunk(tokenizer):
    task = glue.generic_task("scores", "text", ())
    rows = {"text": ["a b c", "d"] * 1100, "label": np.linspace(0, 5, 2200, dtype=np.float32), "row": range(2200)}
    encoded = glue.encode(Dataset.from_dict({name: list(values) for name, values in rows.items()}), task, tokenizer)
    assert encoded.labels.dtype == torch.float32
    assert encoded.lengths.tolist() == [5, 3] * 1100
    assert collate(encoded, [2199])["input_ids"].tolist() == [tokenizer("d")["input_ids"]]
    assert collate(encoded, [2199])["labels"].tolist() == [5.0]
    empty = glue.encode(Dataset.from_dict({"text": [], "label": [], "row": []}), task, tokenizer)
    assert len(empty) == 0


@pytest.mark.usefixtures("unchecked")
def test_a_tokenizer_without_padding_is_refused(tokenizer):
    class Unpadded:
        pad_token_id = None
        num_special_tokens_to_add = staticmethod(lambda pair: 0)

    with pytest.raises(ValueError, match="Unpadded has no padding token"):
        glue.encode(Dataset.from_dict({"first": [], "second": []}), PAIRS, Unpadded())


# Submissions


@pytest.mark.parametrize(
    ("name", "split", "file", "expected"),
    [
        ("cola", "test", "CoLA", "1"), ("sst2", "test", "SST-2", "1"), ("mrpc", "test", "MRPC", "1"),
        ("stsb", "test", "STS-B", "1.000"), ("qqp", "test", "QQP", "1"), ("qnli", "test", "QNLI", "not_entailment"),
        ("rte", "test", "RTE", "not_entailment"), ("wnli", "test", "WNLI", "1"),
        ("mnli", "test_matched", "MNLI-m", "neutral"), ("mnli", "test_mismatched", "MNLI-mm", "neutral"),
        ("mini-mnli", "test", "mini-mnli", "neutral"), ("mini-sst2", "test", "mini-sst2", "1"),
        ("mini-sst2", "validation", "mini-sst2-validation", "1"),
    ],
)  # fmt: skip
def test_predictions_for_the_glue_server(tmp_path, name, split, file, expected):
    task = glue.TASKS[name]
    outputs = np.array([[1.0]]) if task.is_regression else np.eye(task.num_labels)[[1]]
    path = glue.write_predictions(tmp_path / "new folder", task, outputs, split)
    assert path == tmp_path / "new folder" / f"{file}.tsv"
    assert path.read_bytes() == f"index\tprediction\n0\t{expected}\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_scores_are_cut_to_their_range(tmp_path):
    outputs = np.array([[-0.2], [2.34567], [5.4]])
    path = glue.write_predictions(tmp_path, glue.TASKS["stsb"], outputs)
    assert path.read_text() == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"
    free = glue.write_predictions(tmp_path, glue.generic_task("free", "text", ()), outputs)
    assert free.read_text().splitlines()[3] == "2\t5.400"


def test_unusable_predictions_leave_the_old_file(tmp_path, monkeypatch):
    task = glue.TASKS["rte"]
    path = glue.write_predictions(tmp_path, task, np.eye(2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"shape \(2, 3\); task 'rte' needs \(samples, 2\)"):
        glue.write_predictions(tmp_path, task, np.ones((2, 3)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        glue.write_predictions(tmp_path, task, np.full((2, 2), np.nan))

    def disk_full(self, text, **_):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        glue.write_predictions(tmp_path, task, np.eye(2))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Data of one's own

MINE = glue.generic_task("mine", "text")
KINDS = ("csv", "tsv", "jsonl", "json", "parquet")


def own(folder, kind="jsonl", **splits):
    """A folder of files `<split>.<kind>`; each split is given as the list of its labels, or as its columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        if not isinstance(columns, dict):
            columns = {"text": [f"text {i}" for i in range(len(columns))], "label": columns}
        path, table = folder / f"{split}.{kind}", pd.DataFrame(columns)
        if kind in ("csv", "tsv"):
            table.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
        elif kind == "parquet":
            table.to_parquet(path)
        else:
            table.to_json(path, orient="records", lines=kind == "jsonl")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 2, 1], ("1", "2")),
        ([50002, 50001, 50002], ("50001", "50002")),
        ([-1, 1, 10, 2], ("-1", "1", "2", "10")),
        ([0.0, 1.0, 0.0], ("0", "1")),
        ([10**12, 7, 7], ("7", "1000000000000")),
        (["b", "a c", "b"], ("a c", "b")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_the_classes_are_those_that_occur(tmp_path, capsys, monkeypatch, kind, labels, names):
    monkeypatch.setenv("KDLIB_PROGRESS", "1")
    data = glue.load(own(tmp_path, kind, train=labels, validation=labels[::-1]), MINE)
    assert data.task.label_names == names
    of = {True: "True", False: "False"} if isinstance(labels[0], bool) else {}
    expected = [names.index(of.get(v) or (v if isinstance(v, str) else str(int(v)))) for v in labels]
    assert data.train["label"][:] == expected
    assert data.evaluation["validation"]["label"][:] == expected[::-1]
    said = capsys.readouterr().err
    plain = names[0] in ("False", "a c", "0")
    assert bool(data.notes) == bool(said) == (not plain)
    assert plain or f"the labels {', '.join(names)}: they become the classes 0 … {len(names) - 1}" in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        *(([value] * 4, rf"one class only, '{name}', in all 4 rows") for value, name in
          [(0, "0"), (1, "1"), (-1, "-1"), (1.0, "1"), ("a", "a"), (True, "True")]),
        ([0, 1, "NA", 0, 1, "NA"], r"kinds: a number in row 0.*a text in row 2|among numbers: row 2 \('NA'\), row 5"),
        (["0", "1", "0", "?"], r"holds words among numbers: row 3 \('\?'\) \(1 such rows\)"),
        ([0.5, 1.0, 0.0], "holds 0.5 in row 0, which is a score and no class: set regression=True"),
        ([0, None, 1], "label in row 1 of split 'train' .*1 such rows. is missing"),
        (["a", None, "b", None], "label in row 1 of split 'train' .*2 such rows. is missing"),
        (["a", " ", "b"], "label in row 1 of split 'train' .* is missing"),
        (list(range(40)), r"column 'label' of split 'train' .* holds 40 different labels in 40 rows.*label_column"),
        ([f"id{i}" for i in range(40)], "holds 40 different labels in 40 rows"),
        ([[0], [1]], r"label \[0\] \(list\) in row 0"),
    ],
)  # fmt: skip
def test_labels_that_are_no_classes(tmp_path, kind, labels, message):
    if kind == "parquet" and len(set(map(type, labels)) - {type(None)}) > 1:
        pytest.skip("a column of parquet has one type")
    if kind in ("csv", "tsv") and isinstance(labels[0], list):
        pytest.skip("there are no lists in text")
    own(tmp_path, kind, train=labels, validation=labels)
    with pytest.raises(ValueError, match=message) as caught:
        glue.load(tmp_path, MINE)
    assert "label_names" not in str(caught.value) or "in Python" in str(caught.value)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0], r"label \[0\] \(list\) in row 1"),
        ({"a": 1}, r"label \{'a': 1\} \(dict\) in row 1"),
        ("1", r"of several kinds: a number in row 0, 0 and a text in row 1, '1'"),
    ],
)
def test_a_label_of_another_kind_is_named(tmp_path, split, label, message):
    splits = {name: [0, 1, 0] for name in ("train", "validation", "test")}
    own(tmp_path, **(splits | {split: [0, label, 1]}))
    with pytest.raises(ValueError, match=message) as caught:
        glue.load(tmp_path, MINE)
    assert f"split {split!r}" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_train_never_shows_is_named(tmp_path, kind):
    own(tmp_path, kind, train=[1, 3, 1], validation=[3, 2])
    with pytest.raises(
        ValueError, match=r"label 2.* in row 1 of split 'validation' .*expected one of 1, 3, the classes"
    ):
        glue.load(tmp_path, MINE)


def test_many_classes_are_no_identifier(tmp_path):
    names = [f"intent {i}" for i in range(300)]
    data = glue.load(own(tmp_path, train=names * 2, validation=names), MINE)
    assert data.task.num_labels == 300


@pytest.mark.parametrize("role", ["extra", "text", "label"])
@pytest.mark.parametrize(
    "name", ["row", "posterior", "flipped", "clean_label", "idx", "difficulty", "label", "row_", "a.b"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_column_may_have_any_name(tmp_path, role, name, kind, tokenizer):
    columns = {"words": ["a", "b", "c", "d"], "class": ["no", "yes", "no", "yes"]}
    other = {"text": "words", "label": "class"}.get(role)
    columns = {name if key == other else key: values for key, values in columns.items()}
    if role == "extra":
        columns[name] = ["x", "y", "", "z"]
    text, label = (name if role == "text" else "words"), (name if role == "label" else "class")
    own(tmp_path, kind, train=columns, validation=columns)
    data = glue.load(tmp_path, glue.generic_task("mine", text, label_column=label), max_train=3, feedback_fraction=0.3)
    task = data.task
    assert set(data.train.column_names) == {text, label, task.row_column}
    rows = [*data.train[task.row_column], *data.feedback[task.row_column]]
    assert [columns[text][row] for row in rows] == [*data.train[text], *data.feedback[text]]
    encoded = glue.encode(data.evaluation["validation"], task, tokenizer)
    assert encoded.rows.tolist() == [0, 1, 2, 3] and encoded.labels.tolist() == [0, 1, 0, 1]


def test_columns_that_nobody_wants_may_hold_anything(tmp_path):
    extra = [{"deep": [1]}, "text", 3, None, [[]]]
    rows = [{"text": f"text {i}", "label": i % 2, "more": extra[i % 5]} for i in range(10)]
    assert len(glue.load(reviews(tmp_path, rows, rows), MINE).train) == 10


@pytest.mark.parametrize(
    ("texts", "label", "message"),
    [
        (("text", "text"), "label", "'text', which is another text column too"),
        (("text", "label"), "label", "'label', which is the label column too"),
        ("label", "label", "'label', which is the label column too"),
        ("", "label", "a column without a name"),
        (("a", " "), "label", "a column without a name"),
        ("a", "", "a column without a name"),
    ],
)
def test_columns_that_cannot_work_are_named_at_once(texts, label, message):
    with pytest.raises(ValueError, match=message):
        glue.generic_task("mine", texts, label_column=label)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dev", "valid", "val", "eval"])
def test_other_names_of_validation(tmp_path, kind, name):
    own(tmp_path, kind, train=[0, 1] * 10, **{name: [1, 0, 1]})
    data = glue.load(tmp_path, MINE)
    assert data.evaluation["validation"]["label"][:] == [1, 0, 1]
    assert data.notes == (f"task 'mine': what is called {name!r} in {tmp_path} is taken for the split 'validation'",)
    assert data.carved == () and data.test == {}
    own(tmp_path, kind, validation=[0, 1])
    data = glue.load(tmp_path, MINE)
    assert len(data.evaluation["validation"]) == 2 and data.notes == ()


def test_two_names_for_validation_are_ambiguous(tmp_path):
    own(tmp_path, train=[0, 1] * 10, dev=[1, 0, 1], val=[0, 1])
    with pytest.raises(ValueError, match="has dev and val, and no split 'validation': rename"):
        glue.load(tmp_path, MINE)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=80).filter(lambda labels: len(set(labels)) > 1), st.booleans())
def test_a_tenth_of_train_is_cut_out_where_there_is_no_validation(tmp_path_factory, labels, scores):
    folder = own(tmp_path_factory.mktemp("own"), train=[float(v) for v in labels] if scores else labels)
    task = glue.generic_task("mine", "text", () if scores else None)
    data, again = glue.load(folder, task, seed=0), glue.load(folder, task, seed=9, max_train=5)
    rows = data.evaluation["validation"]["row"][:]
    assert data.carved == again.carved == ("validation",) and "set aside for validation" in data.notes[-1]
    assert again.evaluation["validation"]["row"][:] == rows, "the split belongs to the data"
    assert sorted([*rows, *data.train["row"]]) == list(range(len(labels))), "disjoint and complete"
    if scores:
        assert len(rows) == max(1, round(len(labels) / 10))
    else:
        counts, taken = Counter(labels), Counter(labels[row] for row in rows)
        assert {labels[row] for row in data.train["row"]} == set(labels), "every class is left in train"
        assert all(abs(taken[c] - n / 10) <= 1 for c, n in counts.items() if n > 1)


def test_the_only_row_of_a_class_stays_in_train(tmp_path):
    for often in range(4, 12):
        labels = [*["a", "b"] * often, *"cdefghij"]
        data = glue.load(own(tmp_path, train=labels), MINE)
        assert {labels[row] for row in data.train["row"]} == set(labels)


def test_too_few_rows_to_cut_validation_out(tmp_path):
    with pytest.raises(
        ValueError, match=r"no validation split, and its 2 training rows are too few.*add a file named val"
    ):
        glue.load(own(tmp_path, train=["a", "b"]), MINE)
    with pytest.raises(ValueError, match="no split 'validation' for task 'rte'"):
        columns = {"sentence1": ["a"], "sentence2": ["b"], "label": [0]}
        glue.load(own(tmp_path / "rte", train=columns, test=columns), "rte")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [[2, 1, 1], [-1, -1, -1], None])
def test_a_test_split_is_read_where_there_is_one(tmp_path, kind, labels):
    texts = {"text": ["x", "y", "z"]}
    own(
        tmp_path,
        kind,
        train=[1, 2] * 10,
        validation=[1, 2],
        test=texts if labels is None else texts | {"label": labels},
    )
    data = glue.load(tmp_path, MINE)
    assert data.task.test_splits == ("test",)
    assert data.test["test"]["label"][:] == ([1, 0, 0] if labels == [2, 1, 1] else [-1, -1, -1])
    left = glue.load(tmp_path, glue.generic_task("mine", "text", test_splits=()))
    assert left.test == {} and left.task.test_splits == ()
    (tmp_path / f"test.{kind}").unlink()
    assert glue.load(tmp_path, MINE).task.test_splits == ()


def test_minus_one_is_a_class_where_train_has_it(tmp_path):
    own(tmp_path, train=[-1, 1] * 5, validation=[1, -1], test=[1, -1, 1])
    assert glue.load(tmp_path, MINE).test["test"]["label"][:] == [1, 0, 1]


def test_a_test_split_that_nobody_wants_may_be_missing(tmp_path):
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    own(tmp_path / "rte", train=rows, validation=rows)
    with pytest.raises(ValueError, match=r"no split 'test' for task 'rte'.*predict_test=False"):
        glue.load(tmp_path, "rte")
    data = glue.load(tmp_path, "rte", want_test=False)
    assert data.test == {} and data.task.test_splits == () and data.task.label_names == ("entailment", "not_entailment")
    own(tmp_path / "rte", test=rows)
    assert len(glue.load(tmp_path, "rte", want_test=False).test["test"]) == 2, "one that is there is read"
    assert len(glue.load("miniglue", "mini-sst2", want_test=False).test["test"]) > 0


def test_the_readme_may_promise_a_test_split_that_nobody_wants(tmp_path):
    (sst2(tmp_path) / "sst2/test-00000-of-00001.parquet").unlink()
    assert glue.load(tmp_path, "sst2", want_test=False).test == {}


def test_class_names_that_the_data_declare_and_never_show(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    for split in ("train", "validation"):
        Dataset.from_dict({"text": ["x", "y"], "label": [0, 2]}, features).to_parquet(tmp_path / f"{split}.parquet")
    data = glue.load(tmp_path, MINE)
    assert data.task.label_names == ("a", "b", "c") and data.train["label"][:] == [0, 2]
    assert "never shows b" in data.notes[0]


def test_labels_of_a_declared_class_are_places_even_where_names_are_numbers(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2", "3"])})
    for split in ("train", "validation"):
        rows = {"text": ["x", "y", "z"], "label": [0, 2, 1]}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    assert glue.load(tmp_path, MINE).train["label"][:] == [0, 2, 1]


# Metrics of one's own


def test_metrics_are_checked_at_once():
    assert glue.generic_task("mine", "text", metrics=("macro_f1", "accuracy")).metrics == ("macro_f1", "accuracy")
    with pytest.raises(ValueError, match=r"metric 'makro_f1' does not exist for classes: did you mean 'macro_f1'"):
        glue.generic_task("mine", "text", metrics=("makro_f1",))
    with pytest.raises(ValueError, match=r"metric 'accuracy' does not exist for scores: expected one of pearson"):
        glue.generic_task("mine", "text", (), metrics=("accuracy",))
    with pytest.raises(ValueError, match="metric 'accuracy' is given twice"):
        glue.generic_task("mine", "text", metrics=("accuracy", "accuracy"))


def test_f1_needs_two_classes(tmp_path):
    own(tmp_path, train=["a", "b", "c"] * 4, validation=["a"])
    with pytest.raises(ValueError, match=r"metric 'f1' is for two classes, and task 'mine' has 3: use 'macro_f1'"):
        glue.load(tmp_path, replace(MINE, metrics=("f1",)))
    assert glue.load(tmp_path, replace(MINE, metrics=("macro_f1",))).task.metrics == ("macro_f1",)


# Folders


GARBLED = (
    b"configs: [a: b: c",
    b"x: !!python/object:os.system 1",
    b"text: \xff\xfe",
    b"configs: 7",
    b"- a",
)


@pytest.mark.parametrize("card", GARBLED)
def test_a_garbled_data_card_is_named(tmp_path, card):
    (own(tmp_path, train=[0, 1], validation=[0, 1]) / "README.md").write_bytes(b"---\n" + card + b"\n---\n")
    with pytest.raises(ValueError, match=r"the data card .*README.md cannot be read .*mend the block"):
        glue.load(tmp_path, MINE)


@pytest.mark.parametrize("files", ["http://example.org/x.csv", ["a.csv", "hf://datasets/x/y.csv"],
                                   [{"split": "train", "path": ["s3://bucket/x.csv"]}]])  # fmt: skip
def test_a_data_card_leads_nowhere_else(tmp_path, files):
    card = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match=r"README.md says that the data are at '.*://.*copy the files into the folder"):
        glue.load(tmp_path, MINE)


def test_a_data_set_saved_to_disk(tmp_path):
    rows = Dataset.from_dict({"text": ["x", "y"] * 10, "label": [0, 1] * 10})
    datasets.DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "dict")
    data = glue.load(tmp_path / "dict", MINE)
    assert len(data.train) == len(data.evaluation["validation"]) == 20
    rows.save_to_disk(tmp_path / "single")
    with pytest.raises(ValueError, match=r"single Dataset that was saved by save_to_disk, without splits: save a Data"):
        glue.load(tmp_path / "single", MINE)
    next((tmp_path / "dict/train").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot read .*dict: .*copy it again"):
        glue.load(tmp_path / "dict", MINE)


@pytest.mark.usefixtures("unchecked")
def test_a_home_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own(tmp_path / "data", train=[0, 1] * 10, validation=[0, 1])
    assert len(glue.load("~/data", MINE).train) == 20
    for whole in ("~", "~/", "/", str(tmp_path), tmp_path):
        with pytest.raises(ValueError, match=r"is a (home folder|root of a file system): give the folder in it"):
            glue.load(whole, MINE)
    with pytest.raises(FileNotFoundError, match="there is no folder '~nobody-is-called-this"):
        glue.load("~nobody-is-called-this/data", MINE)
    for nothing in ("", " ", None, 3):
        with pytest.raises(ValueError, match=r"source is .*; expected a folder"):
            glue.load(nothing, MINE)
    with pytest.raises(ValueError, match="is a file: give the folder that holds it"):
        glue.load(tmp_path / "data/train.jsonl", MINE)


def test_a_folder_may_be_called_like_a_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own(tmp_path / "csv/data", "csv", train=[0, 1] * 10, validation=[0, 1])
    assert len(glue.load("csv", MINE).train) == 20


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="task is None; expected one of cola"):
        glue.load("miniglue", None)
    with pytest.raises(ValueError, match=r"max_train is 2.5; expected at least 1"):
        glue.load("miniglue", "mini-sst2", max_train=2.5)
    with pytest.raises(ValueError, match="a feedback split of nan of"):
        glue.load("miniglue", "mini-sst2", feedback_fraction=float("nan"))


def test_nothing_that_is_here_asks_the_network(tmp_path, monkeypatch):
    """`datasets` swallows what a refused connection raises, so the connections are counted."""
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    rows = {"text": ["dogs run", "cats walk"] * 6, "label": [0, 1] * 6}
    for kind in KINDS:
        own(tmp_path / kind, kind, train=rows, validation=rows)
        own(tmp_path / kind / "data", kind, train=rows)
    (tmp_path / "csv" / "train.txt").write_text("dogs run\n")
    table = Dataset.from_dict(rows)
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "saved")
    (tmp_path / "layout/data").mkdir(parents=True)
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / f"layout/data/{split}-00000-of-00001.parquet")
    (tmp_path / "arrow").mkdir()
    shutil.copy(next((tmp_path / "saved/train").glob("*.arrow")), tmp_path / "arrow/train.arrow")
    shutil.copy(next((tmp_path / "saved/validation").glob("*.arrow")), tmp_path / "arrow/validation.arrow")
    for kind in sorted(path.name for path in tmp_path.iterdir()):
        glue.load(tmp_path / kind, glue.generic_task("mine", "text"))
    for source in ("csv/train.txt", "csv/data", "tsv/data", "jsonl/data", "parquet/data"):
        corpus.load(tmp_path / source, miniglue.tokenizer())
    assert asked == []


# Fingerprints


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    columns = {"text": ["a", "b c", "ä", "d"] * 3, "label": [3, 1, 3, 1] * 3}
    other_order = dict(reversed(columns.items())) | {"more": ["x"] * 12}
    seen = set()
    for number, kind in enumerate((*KINDS, *KINDS)):
        rows = columns if number < len(KINDS) else other_order
        own(tmp_path / str(number), kind, train=rows, validation=rows, test=rows)
        data = glue.load(tmp_path / str(number), MINE, max_train=8, feedback_fraction=0.25)
        seen.add(glue.fingerprint(data))
    assert len(seen) == 1 and len(seen.pop()) == 16


PAIR = glue.generic_task("pair", ("first", "second"), ("no", "yes"), test_splits=("test",))


@settings(max_examples=20)
@given(st.data())
def test_no_change_leaves_the_fingerprint_alone(data):
    letters = st.text("ab ", max_size=3)
    rows = data.draw(st.lists(st.tuples(letters, letters, st.integers(0, 1)), min_size=1, max_size=5))
    splits = {"train": rows, "feedback": rows, "validation": rows, "test": rows}
    changed = dict(splits)
    name = data.draw(st.sampled_from([*splits]))
    changed[name] = data.draw(
        st.one_of(
            st.permutations(rows),
            st.lists(st.tuples(letters, letters, st.integers(0, 1)), min_size=1, max_size=5),
            # A letter moves from one text to the next, or from one row to the next.
            st.just([(a[:-1], a[-1:] + b, label) for a, b, label in rows]),
            st.just([(rows[0][0] + rows[-1][0][:1], *rows[0][1:]), *rows[1:-1], (rows[-1][0][1:], *rows[-1][1:])]),
        )
    )

    def told(parts, task=PAIR):
        made = {}
        for split, values in parts.items():
            columns = dict(zip(("first", "second", "label"), zip(*values, strict=True), strict=True))
            table = pa.table(columns | {"row": range(len(values))})
            made[split] = Dataset(table, fingerprint="unused")  # `datasets` would take milliseconds for one
        return glue.fingerprint(
            glue.TaskData(
                task, made["train"], {"validation": made["validation"]}, {"test": made["test"]}, made["feedback"]
            )
        )

    before = told(splits)
    assert (told(changed) == before) == (changed[name] == splits[name])
    assert told(splits, replace(PAIR, label_names=("yes", "no"))) != before


def test_the_fingerprint_sees_splits_and_scores(tmp_path):
    own(tmp_path, train=[0.5, 1.5] * 6, validation=[1.0, 2.0], test=[1.0, 2.0])
    task = glue.generic_task("mine", "text", ())
    data = glue.load(tmp_path, task)
    others = [
        replace(data, test={}), replace(data, evaluation={"dev": data.evaluation["validation"]}),
        replace(data, feedback=data.train), replace(data, train=data.train.select([1, 0, *range(2, 12)])),
        replace(data, train=data.train.select(range(11))), replace(data, test={"test": data.train}),
    ]  # fmt: skip
    assert len({glue.fingerprint(each) for each in (data, *others)}) == 7
    assert glue.fingerprint(replace(data, train=data.train.select(range(12)))) == glue.fingerprint(data)


# Unknown words


def texts_of(texts, split="validation"):
    rows = {"text": texts, "label": [0] * len(texts), "row": list(range(len(texts)))}
    return Dataset.from_dict(rows, split=datasets.NamedSplit(split))


@pytest.mark.parametrize(("known", "strange"), [(1, 0), (99, 1), (19, 1), (9, 1), (1, 1), (49, 51), (0, 3)])
def test_unknown_words_are_counted_told_and_refused(tokenizer, capsys, monkeypatch, known, strange):
    monkeypatch.setenv("KDLIB_PROGRESS", "1")
    words = ["a"] * known + [f"zebra{i}" for i in range(strange)]
    rows = texts_of([" ".join(words[start : start + 7]) for start in range(0, len(words), 7)])
    share = strange / (known + strange)
    if share > 0.5:
        with pytest.raises(
            ValueError, match=rf"^{share:.0%} of the pieces of split 'validation' of task 'reviews' are \[UNK\]"
        ):
            glue.encode(rows, REVIEWS, tokenizer)
        return
    assert glue.encode(rows, REVIEWS, tokenizer).unknown == pytest.approx(share)
    said = capsys.readouterr().err
    assert ("are [UNK]" in said) == (share >= 0.05) == ("'zebra0'" in said)


def test_a_text_of_unknown_words_is_refused_and_five_of_them_are_shown(tokenizer):
    with pytest.raises(ValueError, match=r"the tokenizer does not know these words \('这', '部', '电', '影', '很'\)"):
        glue.encode(texts_of(["这部电影很好"]), REVIEWS, tokenizer)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.text("abcdxy ,.é\u4e00", max_size=400), st.text("abcd \n", max_size=400)), min_size=1, max_size=4
    ),
    st.integers(5, 20),
)
def test_long_pairs_have_the_tokens_that_the_tokenizer_gives_them(tokenizer, pairs, max_length):
    first, second = ([f"a {text}" for text in texts] for texts in zip(*pairs, strict=True))
    rows = {"first": first, "second": second, "label": [0] * len(first), "row": range(len(first))}
    expected = tokenizer(first, second, truncation=True, max_length=max_length)
    try:
        found = glue.encode(Dataset.from_dict(rows), PAIRS, tokenizer, max_length)
    except ValueError as error:
        assert "[UNK]" in str(error)
        return
    assert found.input_ids.tolist() == list(chain.from_iterable(expected["input_ids"]))
    assert found.token_type_ids.tolist() == list(chain.from_iterable(expected["token_type_ids"]))


def test_long_pairs_are_cut_before_they_are_paired(tokenizer):
    texts = ["a b c d " * 5000] * 2
    rows = Dataset.from_dict({"first": texts, "second": texts, "label": [0, 1], "row": [0, 1]})
    lengths = []

    class Watched:
        __class__ = type(tokenizer)  # it passes for one

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *given, **options):
            lengths.append(max(len(text) for text in given[-1]) if len(given) == 2 else 0)
            return tokenizer(*given, **options)

    glue.encode(rows, PAIRS, Watched(), 16)
    assert max(lengths) < 200, "the time grows with the product of the lengths"


# Names of files

ANY = st.text(st.characters(), max_size=12)


@settings(max_examples=200)
@given(
    st.one_of(
        ANY, st.sampled_from(["..", ".", "a/b", "../x", "/etc/x", "a\\b", "C:\\x", "x\0y", "a" * 300, "é" * 60, "\n"])
    ),
    ANY,
)
def test_a_file_of_predictions_is_in_its_folder_or_nowhere(tmp_path_factory, name, split):
    folder = tmp_path_factory.mktemp("outer") / "inner"
    task = glue.Task(name, ("text",), ("no", "yes"), ("accuracy",))
    try:
        path = glue.write_predictions(folder, task, np.eye(2), split)
    except ValueError as error:
        assert "files are named after it" in str(error)
        assert not folder.exists() and list(folder.parent.iterdir()) == []
        return
    assert path.resolve().parent == folder.resolve()
    assert [entry.name for entry in folder.iterdir()] == [path.name] and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "a\\b", "x\ny", "a" * 300])
def test_a_name_that_no_file_can_have_is_refused_before_any_work(name):
    with pytest.raises(ValueError, match="files are named after it: choose a short name"):
        glue.generic_task(name, "text")
    with pytest.raises(ValueError, match="split name"):
        glue.generic_task("mine", "text", test_splits=(name,))


@settings(max_examples=40)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=2, max_size=5, unique=True
    )
)
def test_a_table_of_predictions_has_a_row_a_line(tmp_path_factory, names):
    task = glue.Task("mine", ("text",), tuple(names), ("accuracy",))
    path = glue.write_predictions(tmp_path_factory.mktemp("out"), task, np.eye(len(names)))
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == "index\tprediction" and lines[-1] == "" and len(lines) == len(names) + 2
    rows = [line.split("\t") for line in lines[1:-1]]
    assert [row[0] for row in rows] == [str(i) for i in range(len(names))] and {len(row) for row in rows} == {2}
    assert len({row[1] for row in rows}) == len(names)
    if not any(set(name) & set("\t\r\n") for name in names):
        assert [row[1] for row in rows] == names
