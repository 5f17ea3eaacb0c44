"""What was tried before the records were made: complete tables, and experiments that take the best of them."""

from collections import Counter

import pandas as pd
import pytest

from kdlib import book
from tools import experiments, tutor_records

CHAPTERS = list(experiments.CANDIDATES)


def table_of(chapter: str) -> pd.DataFrame:
    return book.choices(chapter)


def best(table: pd.DataFrame, *fields: str) -> tuple:
    """The values of the fields with the highest accuracy, averaged over everything else."""
    return table.groupby(list(fields))["mean"].mean().idxmax()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_table_has_a_row_for_all_that_was_tried(chapter):
    configs, by = experiments.CANDIDATES[chapter]
    wanted = Counter(tuple(plain(config.flat[name]) for name in by) for config in configs())
    found = {tuple(plain(row[name]) for name in by): row["count"] for row in table_of(chapter).to_dict("records")}
    assert found == wanted


def plain(value) -> str:
    """A field's value, whether it has been through a file or not."""
    return "" if value is None or value != value else str(float(value)) if isinstance(value, (int, float)) else value


def test_a_chapter_without_a_table_says_how_to_make_it():
    with pytest.raises(FileNotFoundError, match=r"tools\.experiments --choose 03_nothing"):
        book.choices("03_nothing")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_record_has_a_seed_that_chose(chapter):
    configs, _ = experiments.CANDIDATES[chapter]
    assert {config.seed for config in configs()} == set(experiments.CHOOSING)
    assert not set(experiments.CHOOSING) & {config.seed for config in experiments.EXPERIMENTS[chapter]()}


@pytest.mark.parametrize("task", experiments.TEACHER_TASKS)
def test_chapter_5_takes_its_best_rates(task):
    table = table_of("05_pilot_updates").query("task == @task")
    meta, teaching = table[table["method"] == "metadistil"], experiments.META_RATES[task]
    tried = meta[meta["pilot_update"].astype(bool) & (meta["pilot_rule"] == "sgd") & (meta["teaching_rate"] == 3e-5)]
    both = pd.concat([table[table["method"] == "kd"], tried])
    both = both[both["learning_rate"].isin(tried["learning_rate"])]
    student = best(both, "learning_rate")
    assert student == experiments.META_STUDENT_RATES[task]
    assert best(meta[meta["learning_rate"] == student], "teaching_rate") == teaching
    assert meta["teaching_rate"].min() < teaching < meta["teaching_rate"].max()


def test_chapter_1_takes_the_best_rate_over_its_tasks():
    assert best(table_of("01_distillation"), "learning_rate") == experiments.STUDENT_SETTINGS["learning_rate"]


@pytest.mark.parametrize("methods", [["fine_tune"], ["kd"], ["prokt", "dml"]])
def test_chapter_4_takes_the_best_rates_over_its_tasks(methods):
    """The online methods share theirs."""
    table = table_of("04_online_distillation").query("method in @methods").fillna({"teaching_rate": -1})
    rate, teaching_rate = best(table, "learning_rate", "teaching_rate")
    for method in methods:
        assert experiments.ONLINE_RATES[method] == (rate, None if teaching_rate < 0 else teaching_rate)


def test_chapter_6_takes_its_best_settings():
    """The student's rate for each task by the fixed teacher; one teacher's rate for everything; PKD's weight."""
    table = table_of("06_student_feedback")
    patient, plain_ones = table[table["pkd_weight"].notna()], table[table["pkd_weight"].isna()]
    for task, rate in experiments.FEEDBACK_STUDENT_RATES.items():
        fixed = plain_ones[(plain_ones["task"] == task) & (plain_ones["method"] == "kd")]
        assert best(fixed, "learning_rate") == rate
    assert set(experiments.FEEDBACK_RATES.values()) == {best(plain_ones.query("method == 'ikd'"), "teaching_rate")}
    assert best(patient, "pkd_weight") == experiments.PKD_WEIGHT


def test_chapter_7_takes_the_rate_that_is_best_for_all():
    assert best(table_of("07_good_teachers"), "teaching_rate") == experiments.LGTM_RATE


def test_chapter_9_takes_its_best_rates():
    """Of the fine-tuning for all ways together; of the distillation for each way over its tasks."""
    table = table_of("09_tutor_kd")
    tuning, distilling = (table[table["tuned"] == tuned] for tuned in ("fine-tuning", "distillation"))
    assert best(tuning, "rate") == tutor_records.FINE_TUNING_RATE
    for way in tutor_records.COMPARED:
        rate = tutor_records.config_of(way, 0, tutor_records.WORK).learning_rate
        assert best(distilling[distilling["way"] == way], "rate") == rate, way
    trials = Counter((t.tuned, t.way, t.rate) for t in tutor_records.trials())
    found = {(row["tuned"], row["way"], row["rate"]): row["count"] for row in table.to_dict("records")}
    assert found == trials
    assert not set(tutor_records.CHOOSING) & set(tutor_records.SEEDS)
