"""Records of finished runs: that they come back, what is said of damaged ones, and tables over many of them."""

import dataclasses
import json

import numpy as np
import pytest

from kdlib.records import RECORD, ROWS, RunRecord, is_record, read_record, results, write_record


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
        assert results(tmp_path, by=["method"])["n"].tolist() == [6]

    @pytest.mark.parametrize("by", [None, ["task"], ["task", "method"]])
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

    def test_an_empty_folder_gives_an_empty_table(self, tmp_path):
        assert results(tmp_path).empty

    def test_flat_record_files_count_and_other_json_does_not(self, record, tmp_path):
        (tmp_path / "one.json").write_text((record.folder / "record.json").read_text())
        (tmp_path / "other.json").write_text(json.dumps({"something": "else"}))
        assert results(tmp_path)["n"].tolist() == [1] * len(results(tmp_path))
