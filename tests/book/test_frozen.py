"""What a run is called may not change: the names of the book's runs, frozen before the engine was rebuilt.

`frozen_runs.jsonl` has the parameters of every run that the experiments ask for, trials included, and its name.  A name
that changes would orphan a record: whoever changes one on purpose says why in the commit and writes the file anew.
"""

import json
from pathlib import Path

import pytest

from kdlib import pretraining, records, runs
from tools import experiments

FROZEN = [json.loads(line) for line in Path(__file__).with_name("frozen_runs.jsonl").read_text().splitlines()]
CONFIGURE = {"glue": runs.configure, "text": pretraining.configure}
RECORDS = [path for path in sorted(experiments.RECORDS.rglob("*.json")) if records.is_record(path)]


def test_the_names_of_all_runs_are_as_they_were():
    for run in FROZEN:
        assert CONFIGURE[run["kind"]](**run["given"]).asked_id == run["run_id"], run["given"]


def test_every_experiment_and_every_trial_is_frozen():
    frozen = {run["run_id"] for run in FROZEN}
    asked = [*experiments.EXPERIMENTS.values(), *(trials for trials, _ in experiments.CANDIDATES.values())]
    for made in asked:
        assert {config.asked_id for config in made()} <= frozen


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_record_can_be_configured_again(path):
    """Its name is that of its parameters, or one that its chapter has given it."""
    record = runs.read_record(path)
    kind = "text" if "corpus" in record.config else "glue"
    again = CONFIGURE[kind](**record.config)
    named = path.parent.name == "11_pretraining"
    assert path.stem == record.run_id and (named or again.asked_id == record.run_id)
    assert {name: again.flat[name] for name in record.config} == record.config


def test_data_and_networks_of_the_book_count_by_their_names():
    for run in FROZEN:
        config = CONFIGURE[run["kind"]](**run["given"])
        if config.teacher in ("teacher",) or getattr(config, "source", "miniglue") != "miniglue":
            continue
        if getattr(config, "corpus", "mini-corpus") == "mini-corpus":
            assert config.run_id == config.asked_id
