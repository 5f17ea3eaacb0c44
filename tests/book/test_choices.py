"""What was tried before the records were made: complete tables, and experiments that take the best of them."""

from collections import Counter

import pandas as pd
import pytest

from kdlib import book
from tests.book.studies import STUDIES

CHOOSING = [study for study in STUDIES.values() if study.sheet.choose]
by_name = {"ids": lambda study: study.name}


def settings(study: str, *arms: str, name: str, **wanted) -> set:
    """The values of a parameter in the cells of a study."""
    units = [unit for unit in STUDIES[study].units if not arms or unit.arm in arms]
    units = [unit for unit in units if all(unit.parameters.get(key) == value for key, value in wanted.items())]
    return {unit.parameters.get(name) for unit in units}


def table_of(chapter: str) -> pd.DataFrame:
    return book.choices(chapter)


def best(table: pd.DataFrame, *fields: str) -> tuple:
    """The values of the fields with the highest accuracy, averaged over everything else."""
    return table.groupby(list(fields))["mean"].mean().idxmax()


@pytest.mark.parametrize("study", CHOOSING, **by_name)
def test_a_table_has_a_row_for_all_that_was_tried(study):
    by = study.sheet.choose.by
    wanted = Counter(tuple(plain(unit.config.flat[name]) for name in by) for unit in study.trials)
    found = {tuple(plain(row[name]) for name in by): row["count"] for row in table_of(study.name).to_dict("records")}
    assert found == wanted


def plain(value) -> str:
    """A field's value, whether it has been through a file or not."""
    return "" if value is None or value != value else str(float(value)) if isinstance(value, (int, float)) else value


def test_a_chapter_without_a_table_says_how_to_make_it():
    with pytest.raises(FileNotFoundError, match=r"03_nothing\.yml --choose"):
        book.choices("03_nothing")


@pytest.mark.parametrize("study", CHOOSING, **by_name)
def test_no_record_has_a_seed_that_chose(study):
    assert {unit.seed for unit in study.trials} == {100, 101, 102}
    assert not {unit.seed for unit in study.trials} & {unit.seed for unit in study.units}


@pytest.mark.parametrize("task", ["mini-sst2", "mini-mnli"])
def test_chapter_5_takes_its_best_rates(task):
    table = table_of("05_pilot_updates").query("task == @task")
    meta = table[table["method"] == "metadistil"]
    (teaching,) = settings("05_pilot_updates", "meta", name="teaching_rate", task=task)
    tried = meta[meta["pilot_update"].astype(bool) & (meta["pilot_rule"] == "sgd") & (meta["teaching_rate"] == 3e-5)]
    both = pd.concat([table[table["method"] == "kd"], tried])
    both = both[both["learning_rate"].isin(tried["learning_rate"])]
    student = best(both, "learning_rate")
    assert {student} == settings("05_pilot_updates", name="learning_rate", task=task)
    assert best(meta[meta["learning_rate"] == student], "teaching_rate") == teaching
    assert meta["teaching_rate"].min() < teaching < meta["teaching_rate"].max()


def test_chapter_1_takes_the_best_rate_over_its_tasks():
    assert {best(table_of("01_distillation"), "learning_rate")} == settings("01_distillation", name="learning_rate")


@pytest.mark.parametrize("methods", [["fine_tune"], ["kd"], ["prokt", "dml"]])
def test_chapter_4_takes_the_best_rates_over_its_tasks(methods):
    """The online methods share theirs."""
    table = table_of("04_online_distillation").query("method in @methods").fillna({"teaching_rate": -1})
    rate, teaching_rate = best(table, "learning_rate", "teaching_rate")
    for method in methods:
        wanted = {"method": method, "teacher": None if method == "fine_tune" else "tiny-2x64"}
        assert settings("04_online_distillation", name="learning_rate", **wanted) == {rate}
        found = settings("04_online_distillation", name="teaching_rate", **wanted)
        assert found == {None if teaching_rate < 0 else teaching_rate}


def test_chapter_6_takes_its_best_settings():
    """The student's rate for each task by the fixed teacher; one teacher's rate for everything; PKD's weight."""
    table, name = table_of("06_student_feedback"), "06_student_feedback"
    patient, plain_ones = table[table["pkd_weight"].notna()], table[table["pkd_weight"].isna()]
    for task in ("mini-sst2", "mini-mnli"):
        fixed = plain_ones[(plain_ones["task"] == task) & (plain_ones["method"] == "kd")]
        assert {best(fixed, "learning_rate")} == settings(name, name="learning_rate", task=task)
    rates = settings(name, name="teaching_rate", method="ikd")
    assert rates == {best(plain_ones.query("method == 'ikd'"), "teaching_rate")}
    assert settings(name, "PKD", "PKD with IKD", name="pkd_weight") == {best(patient, "pkd_weight")}


def test_chapter_7_takes_the_rate_that_is_best_for_all():
    rates = settings("07_good_teachers", name="teaching_rate")
    assert rates == {best(table_of("07_good_teachers"), "teaching_rate")}


def test_chapter_9_takes_its_best_rates():
    """Of the fine-tuning for all ways together; of the distillation for each way over its tasks."""
    table = table_of("09_tutor_kd")
    tuning, distilling = (table[table["tuned"] == tuned] for tuned in ("fine-tuning", "distillation"))
    units = STUDIES["09_tutor_kd"].units
    assert {run["learning_rate"] for unit in units for run in unit.then} == {best(tuning, "rate")}
    compared = set(distilling["way"])
    assert len(compared) == 7
    for way in compared:
        rate = best(distilling[distilling["way"] == way], "rate")
        assert settings("09_tutor_kd", way, name="learning_rate") == {rate}
