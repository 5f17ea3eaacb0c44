import json
import os
import shutil
import socket
from collections import Counter
from dataclasses import replace
from itertools import chain

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from kdlib import glue, miniglue

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


def test_a_batch_is_what_the_tokenizer_pads(tokenizer):
    rows, encoded = encoded_pairs(tokenizer)
    assert encoded.input_ids.dtype == torch.int32 and len(encoded) == 7
    indices = [5, 0, 3, 6]
    batch = glue.collate(encoded, indices)
    expected = tokenizer(
        [rows["first"][i] for i in indices], [rows["second"][i] for i in indices],
        padding="longest", truncation=True, max_length=12, return_tensors="pt",
    )  # fmt: skip
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        torch.testing.assert_close(batch[name], expected[name])
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0, 1, 0] and batch["rows"].tolist() == [15, 10, 13, 16]
    assert encoded.lengths[indices].tolist() == expected["attention_mask"].sum(1).tolist()
    alone = glue.collate(encoded, [0])
    assert alone["input_ids"].shape == (1, 6) and alone["attention_mask"].all()
    assert glue.to_device(batch, "cpu").keys() == batch.keys()


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
    assert glue.collate(encoded, [2199])["input_ids"].tolist() == [tokenizer("d")["input_ids"]]
    assert glue.collate(encoded, [2199])["labels"].tolist() == [5.0]
    empty = glue.encode(Dataset.from_dict({"text": [], "label": [], "row": []}), task, tokenizer)
    assert len(empty) == 0


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    class Unpadded:
        pad_token_id = None
        num_special_tokens_to_add = staticmethod(lambda pair: 0)

    with pytest.raises(ValueError, match="Unpadded has no padding token"):
        glue.encode(Dataset.from_dict({"first": [], "second": []}), PAIRS, Unpadded())


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 128), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.integers(1, 60),
)
def test_every_sample_is_in_exactly_one_batch(lengths, size, seed, group):
    batches = glue.length_grouped_batches(torch.tensor(lengths), size, torch.Generator().manual_seed(seed), group)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)
    again = glue.length_grouped_batches(torch.tensor(lengths), size, torch.Generator().manual_seed(seed), group)
    assert batches == again
    in_order = glue.sequential_batches(torch.tensor(lengths), size)
    assert sorted(chain.from_iterable(in_order)) == list(range(len(lengths)))
    seen = [lengths[i] for batch in in_order for i in batch]
    assert seen == sorted(lengths)


def test_grouping_saves_padding_and_keeps_chance():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (2000,), generator=generator)

    def fill(batches):
        return float(lengths.sum()) / sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    random_batches = [batch.tolist() for batch in torch.randperm(2000, generator=generator).split(32)]
    epochs = [glue.length_grouped_batches(lengths, 32, generator) for _ in range(2)]
    assert fill(random_batches) < 0.6 < 0.9 < fill(epochs[0])
    assert epochs[0] != epochs[1]
    # Neither long nor short batches come first: the order of lengths is random over the epoch.
    means = [float(lengths[batch].float().mean()) for batch in epochs[0]]
    steps = np.sign(np.diff(means))
    assert 15 < (steps > 0).sum() < 47


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
