"""The comparison on real text: its records are those of the command and name no folder of a machine."""

import itertools
import json

import pytest

from kdlib import runs
from tools import experiments, text_comparison
from tools.text_comparison import DISTILLED, SEEDS, TEXT, WAYS

NAMES = ["teacher", *(f"{way}-seed{seed}" for way, seed in itertools.product(("none", *WAYS), SEEDS))]


def record_of(name: str) -> runs.RunRecord:
    return runs.read_record(experiments.RECORDS / text_comparison.CHAPTER / f"{name}.json")


def test_there_is_a_record_for_each_way_and_seed_and_no_other():
    found = {path.stem for path in (experiments.RECORDS / text_comparison.CHAPTER).glob("*.json")}
    assert found == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_of_the_command_and_names_no_machine(name):
    record = record_of(name)
    assert record.run_id == name and record.environment["threads"] == "1"
    text = json.dumps(record.config)
    assert str(experiments.ROOT) not in text and "/tmp" not in text and record.config["output_dir"] == "_runs"
    if name.startswith("none"):
        assert (record.config["source"], record.config["student"]) == (text_comparison.HUB, text_comparison.STUDENT)
    else:
        settings = text_comparison.HEAD if name == "teacher" else {**DISTILLED, **WAYS[name.rsplit("-", 1)[0]]}
        assert {field: record.config[field] for field in {**TEXT, **settings}} == {**TEXT, **settings}
        assert record.config["corpus"] == text_comparison.CORPUS and record.samples["train/undecodable"] == 0
    if name != "teacher":
        assert str(record.config["seed"]) == name[-1] and 0 < record.metrics["sst2/accuracy"] < 1


def test_both_ways_take_as_many_steps_on_the_same_text():
    records = [record_of(name) for name in NAMES if not name.startswith(("none", "teacher"))]
    assert len({json.dumps(record.samples) for record in records}) == 1
    assert {record.history[-1]["step"] for record in records} == {DISTILLED["steps"]}
