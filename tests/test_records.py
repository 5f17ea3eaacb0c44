"""Records of finished runs: that they come back, what is said of damaged ones, and tables over many of them."""

import dataclasses
import json

import numpy as np
import pytest

from kdlib import book, compare
from kdlib.records import (
    RECORD,
    ROWS,
    RunRecord,
    arms,
    by_task,
    is_record,
    latex,
    markdown,
    read_record,
    results,
    scoreboard,
    write_record,
)


@pytest.fixture
def record(tmp_path_factory):
    """A record in a folder of its own."""
    folder = tmp_path_factory.mktemp("record")
    made = RunRecord(
        run_id="mini-mnli-kd-seed0-12345678",
        config={"task": "mini-mnli", "method": "kd", "temperature": 2.0, "seed": 0, "output_dir": str(folder)},
        metrics={"validation/accuracy": 0.1 + 0.2, "test/accuracy": 0.5},
        best_step=4,
        history=[{"step": 2, "train_loss": 1.0}, {"step": 4, "train_loss": 0.5}],
        seconds=1.5,
        samples={"train": 96, "validation": 64},
        parameters=1000,
        teacher=None,
        oracle={"test/kl": 0.25},
        environment={"torch": "x"},
        git_commit=None,
        finished="2026-01-01T00:00:00+00:00",
        folder=folder,
    )
    write_record(made)
    return made


def test_a_record_comes_back_from_its_folder_and_from_its_file(record, tmp_path):
    assert read_record(record.folder) == read_record(record.folder / RECORD) == record
    assert read_record(record.folder).folder == read_record(record.folder / RECORD).folder == record.folder
    assert record.history_frame["train_loss"].tolist() == [1.0, 0.5]
    assert is_record(record.folder / RECORD) and [path.name for path in record.folder.iterdir()] == [RECORD]


def test_a_record_that_is_no_record_is_named(tmp_path):
    for content in (b"\xff\xfe{", b"{", b'{"run_id": "x", "config"', b"[]", b'{"run_id": "a"}'):
        (tmp_path / RECORD).write_bytes(content)
        with pytest.raises(ValueError, match=r"record\.json is not a complete run record .*: delete it and run again"):
            read_record(tmp_path)
    (tmp_path / RECORD).unlink()
    (tmp_path / RECORD).mkdir()
    with pytest.raises(ValueError, match="is not a complete run record"):
        read_record(tmp_path)


def test_a_records_fields_that_came_later_may_be_missing(record, tmp_path):
    """Records from before they were there can still be read."""
    fields = {
        name: value for name, value in vars(record).items() if name not in ("folder", "contents", "unknown", "notes")
    }
    (tmp_path / RECORD).write_text(json.dumps(fields))
    again = read_record(tmp_path)
    assert again == record and (again.contents, again.unknown, again.notes) == ({}, {}, [])


class TestResults:
    def test_mean_standard_deviation_and_n_over_seeds(self, record, tmp_path):
        for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.9)):
            for temperature, shift in ((1.0, 0.0), (2.0, 0.05)):
                config = {**record.config, "seed": seed, "temperature": temperature}
                values = {"test/accuracy": accuracy + shift}
                name = f"{seed}-{temperature}"
                where = tmp_path / name
                where.mkdir()
                write_record(
                    dataclasses.replace(record, run_id=name, config=config, metrics=values, oracle={}, folder=where)
                )
        table = results(tmp_path)
        assert list(table) == ["task", "method", "temperature", "metric", "mean", "std", "n"]
        first = table[table["temperature"] == 1.0].iloc[0]
        assert first["mean"] == pytest.approx(np.mean([0.5, 0.6, 0.9]))
        assert first["std"] == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1)) and first["n"] == 3
        assert results(tmp_path, by=["temperature"])["mean"].tolist() == table["mean"].tolist()
        with pytest.raises(
            ValueError, match=r"by method would put runs together .* temperature \(1\.0, 2\.0\): add to it"
        ):
            results(tmp_path, by=["method"])

    @pytest.mark.parametrize("by", [None, ["method"], ["task", "method"]])
    def test_runs_that_saw_different_rows_are_not_put_together(self, record, tmp_path, by):
        """As those of two methods, one of which keeps some rows for feedback."""
        for number, (method, rows) in enumerate((("kd", 96), ("kd", 96), ("lgtm", 86))):
            config = {**record.config, "method": method, "seed": number}
            fields = {"config": config, "metrics": {"test/accuracy": 0.5}, "oracle": {}, "samples": {"train": rows}}
            folder = tmp_path / str(number)
            folder.mkdir()
            write_record(dataclasses.replace(record, run_id=str(number), folder=folder, **fields))
        table = results(tmp_path, by=by)
        assert dict(zip(table[ROWS], table["n"], strict=True)) == {96: 2, 86: 1}

    def test_are_read_task_by_task_without_what_is_the_same_or_not_there(self, record, tmp_path):
        told = [
            {"task": "a", "method": "kd", "temperature": 1.0, "epochs": 3},
            {"task": "a", "method": "kd", "temperature": 2.0, "epochs": 3},
            {"task": "b", "method": "fine_tune", "epochs": 4},
            {"method": "tutor", "corpus": "text"},
        ]
        for number, config in enumerate(told):
            fields = {"config": config, "metrics": {"loss": 0.25}, "oracle": {}, "folder": tmp_path / str(number)}
            fields["folder"].mkdir()
            write_record(dataclasses.replace(record, run_id=str(number), **fields))
        found = by_task(results(tmp_path))
        assert list(found) == ["a", "b", "text"] and by_task(results(tmp_path / "none")) == {}
        assert list(found["a"]) == ["method", "temperature", "metric", "mean", "n"]
        assert found["a"].to_numpy().tolist() == [["kd", t, "loss", "0.25", "1"] for t in "12"]
        assert list(found["b"]) == list(found["text"]) == ["method", "metric", "mean", "n"]

    def test_an_empty_folder_gives_an_empty_table(self, tmp_path):
        assert results(tmp_path).empty

    def test_flat_record_files_count_and_other_json_does_not(self, record, tmp_path):
        (tmp_path / "one.json").write_text((record.folder / "record.json").read_text())
        (tmp_path / "other.json").write_text(json.dumps({"something": "else"}))
        assert results(tmp_path)["n"].tolist() == [1] * len(results(tmp_path))


def made(record, number=None, samples=None, metrics=None, contents=None, **settings):
    """A record like another one, with other settings; its run has a name of its own."""
    config = {**record.config, **settings}
    name = "-".join(f"{key}={value}" for key, value in config.items()) + ("" if number is None else f"-{number}")
    return dataclasses.replace(
        record,
        run_id=name,
        config=config,
        metrics=metrics or {"test/accuracy": 0.5 + 0.01 * config["seed"]},
        samples=samples or {"train": 96},
        contents=contents or {},
    )


class TestArms:
    def test_records_that_differ_in_their_seeds_only_are_one_arm(self, record):
        given = [made(record, seed=n, teacher_seed=50 + n, device=f"cuda:{n}", output_dir=str(n)) for n in (2, 0, 1)]
        (arm,) = arms(given)
        assert [one.config["seed"] for one in arm.records] == [0, 1, 2]
        assert arm.name == "kd" and arm.settings == {"task": "mini-mnli", "method": "kd"}
        assert arm.values("test/accuracy").to_dict() == pytest.approx({0: 0.5, 1: 0.51, 2: 0.52})

    @pytest.mark.parametrize(
        "differing", [{"temperature": 1.0}, {"student": "x"}, {"alpha": True}, {"words": ["a", "b"]}]
    )
    def test_anything_else_makes_another_arm(self, record, differing):
        found = arms([made(record, seed=n, **more) for more in ({}, differing) for n in (0, 1)])
        assert [len(one.records) for one in found] == [2, 2]
        (name,) = differing
        assert found[1].settings[name] == differing[name] and found[1].name == f"kd, {name} {differing[name]}"

    def test_so_do_other_rows_and_other_contents(self, record):
        for more in ({"samples": {"train": 86}}, {"contents": {"teacher": "sha256:1"}}):
            assert [len(one.records) for one in arms([made(record), made(record, number=1, **more)])] == [1, 1]

    def test_rows_tell_arms_apart_without_being_asked_for(self, record):
        found = arms([made(record), made(record, number=1, samples={"train": 86})], by=["method"])
        assert [one.settings for one in found] == [{"method": "kd", ROWS: 96}, {"method": "kd", ROWS: 86}]

    def test_none_is_what_a_field_is_that_is_not_there(self, record):
        given = [made(record, seed=0, student=None), made(record, seed=1), made(record, student="x")]
        assert [(one.name, len(one.records)) for one in arms(given)] == [("kd", 2), ("kd, student x", 1)]

    def test_names_say_what_a_reader_needs(self, record):
        """Fields that follow from the method, and those by which tasks differ alone, are left out."""
        tasks = [("mini-sst2", 1e-3), ("mini-mnli", 2e-3)]
        given = [
            made(record, seed=n, task=task, learning_rate=rate, **more)
            for task, rate in tasks
            for more in ({}, {"temperature": 8.0}, {"method": "lgtm", "influence": "meta"})
            for n in (0, 1)
        ]
        found = arms(given)
        assert [one.name for one in found] == 2 * ["kd, temperature 2.0", "kd, temperature 8.0", "lgtm"]
        assert [one.settings["learning_rate"] for one in found] == 3 * [1e-3] + 3 * [2e-3]
        assert found[2].settings["influence"] == "meta" and found[0].settings["influence"] is None

    def test_a_mixture_is_refused_with_its_fields_and_values(self, record):
        given = [made(record, seed=n, **more) for n in (0, 1) for more in ({}, {"alpha": 0.5, "temperature": 4.0})]
        with pytest.raises(
            ValueError, match=r"by task, method .* in temperature \(2\.0, 4\.0\); alpha \(None, 0\.5\): add"
        ):
            arms(given, by=["task", "method"])
        assert [one.settings for one in arms(given, by=["alpha"])] == [{"alpha": None}, {"alpha": 0.5}]
        assert [one.name for one in arms(given)] == ["kd, temperature 2.0", "kd, temperature 4.0"]  # implies alpha
        for name in ("temprature", "seed", "output_dir"):
            with pytest.raises(ValueError, match=f"no run has a setting {name}; there are alpha, method, task, temp"):
                arms(given, by=["alpha", name])

    def test_a_seed_counts_once(self, record):
        again = made(record)
        assert len(arms([again, dataclasses.replace(again, folder=record.folder / "copy")])[0].records) == 1
        other = made(record, metrics={"test/accuracy": 0.1})
        with pytest.raises(
            ValueError, match=r"same seed and the same settings, keep one of them: task=mini-mnli-.* in "
        ):
            arms([again, other])

    def test_teachers_of_several_seeds_for_one_student_are_several_arms(self, record):
        found = arms([made(record, seed=n, teacher_seed=t) for n in (0, 1) for t in (7, 8)])
        assert [one.name for one in found] == ["kd, teacher_seed 7", "kd, teacher_seed 8"]
        assert [len(one.records) for one in found] == [2, 2]

    def test_a_metric_that_is_missing_is_named(self, record):
        (arm,) = arms([made(record, seed=0), made(record, seed=1, metrics={"test/f1": 0.5})])
        with pytest.raises(
            ValueError, match=r"seed=1.* has no metric 'test/accuracy'; there are test/accuracy, test/f1"
        ):
            arm.values("test/accuracy")

    @pytest.mark.parametrize("chapter", ["01_distillation", "04_online_distillation", "12_glue"])
    def test_the_books_own_records_fall_into_arms(self, chapter):
        given = book.read_records(chapter)
        found = arms(given)
        assert sum(len(one.records) for one in found) == len(given)
        assert len({(one.settings["task"], one.name) for one in found}) == len(found)
        for one in found:
            rest = [{k: v for k, v in r.config.items() if k not in ("seed", "teacher_seed")} for r in one.records]
            assert all(r == rest[0] for r in rest)


class TestTables:
    @pytest.fixture
    def board(self, record):
        given = [made(record, seed=n) for n in range(4)]
        given += [made(record, seed=n, task="mini-sst2", method="a_b") for n in range(2)]
        return scoreboard(arms([*given, made(record, seed=9, task="mini-sst2")]), "test/accuracy")

    def test_a_scoreboard_shows_mean_interval_and_seeds(self, board):
        ends = compare.paired({n: 50.0 + n for n in range(4)}, dict.fromkeys(range(4), 0.0))
        assert board.loc["kd", "mini-mnli"] == f"51.5 ± {ends.half_width:.1f} (4)" == "51.5 ± 2.1 (4)"
        assert board.loc["kd", "mini-sst2"] == "59.0 (1)" and board.loc["a_b", "mini-mnli"] == ""
        assert list(board) == ["mini-mnli", "mini-sst2"] and list(board.index) == ["kd", "a_b"]

    def test_markdown(self, board):
        board.index = ["kd", "a|b"]
        assert markdown(board).splitlines() == [
            "|  | mini-mnli | mini-sst2 |",
            "| --- | --- | --- |",
            "| kd | 51.5 ± 2.1 (4) | 59.0 (1) |",
            r"| a\|b |  | 50.5 ± 6.4 (2) |",
        ]

    def test_latex(self, board):
        board.columns = ["50 % & more", r"x^2 \ {#~$}"]
        assert latex(board).splitlines() == [
            r"\begin{tabular}{lrr}",
            r"\toprule",
            r" & 50 \% \& more & x\textasciicircum{}2 \textbackslash{} \{\#\textasciitilde{}\$\} \\",
            r"\midrule",
            r"kd & 51.5 $\pm$ 2.1 (4) & 59.0 (1) \\",
            r"a\_b &  & 50.5 $\pm$ 6.4 (2) \\",
            r"\bottomrule",
            r"\end{tabular}",
        ]
