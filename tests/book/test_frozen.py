"""What a run is called may not change: the names of the book's runs, frozen before the engine was rebuilt.

`frozen_runs.jsonl` has the parameters of every run that the experiments ask for, trials included, and its name.  A name
that changes would orphan a record: whoever changes one on purpose says why in the commit and writes the file anew.
"""

import json
from pathlib import Path

import pytest

from kdlib import pretraining, records, runs
from tests.book.studies import RECORDS, STUDIES

FROZEN = [json.loads(line) for line in Path(__file__).with_name("frozen_runs.jsonl").read_text().splitlines()]
CONFIGURE = {"glue": runs.configure, "text": pretraining.configure}
RECORDED = [path for path in sorted(RECORDS.rglob("*.json")) if records.is_record(path)]


def test_the_names_of_all_runs_are_as_they_were():
    for run in FROZEN:
        assert CONFIGURE[run["kind"]](**run["given"]).asked_id == run["run_id"], run["given"]


def test_every_run_and_every_trial_of_a_study_is_frozen():
    frozen = {run["run_id"] for run in FROZEN}
    for study in STUDIES.values():
        assert {unit.name for unit in [*study.units, *study.trials] if unit.measure is None} <= frozen, study.name


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_record_can_be_configured_again(path):
    """Its name is that of its parameters, or where a study measures something else, of arm and seed."""
    record = runs.read_record(path)
    kind = "text" if "corpus" in record.config else "glue"
    again = CONFIGURE[kind](**record.config)
    assert path.parent.name == "teachers" or path.stem == record.run_id
    assert path.parent.name == "11_pretraining" or again.asked_id == record.run_id
    assert {name: again.flat[name] for name in record.config} == record.config


def test_data_and_networks_of_the_book_count_by_their_names():
    for run in FROZEN:
        config = CONFIGURE[run["kind"]](**run["given"])
        if config.teacher in ("teacher",) or getattr(config, "source", "miniglue") != "miniglue":
            continue
        if getattr(config, "corpus", "mini-corpus") == "mini-corpus":
            assert config.run_id == config.asked_id
