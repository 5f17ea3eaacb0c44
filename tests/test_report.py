"""Teacher and student side by side: that sizes are those of the networks, and what is measured behaves as it must."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile

from kdlib import engine, exports, glue, metrics, models, records, report, runs
from kdlib.batches import collate
from tests.quick import QUICK


@pytest.fixture(scope="module")
def record(finished_run):
    return finished_run


@pytest.fixture(scope="module")
def encoded(record):
    config = runs.configure(**record.config)
    data = runs.load_data(config)
    return glue.encode(data.evaluation["validation"], data.task, models.load_tokenizer("tiny-2x64"))


def shapes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no dict)


def test_a_record_tells_what_the_saved_weights_hold(record):
    """By the header of the file, in which nothing of kdlib had a hand."""
    for each in (record, records.read_record(record.folder.parent / record.teacher)):
        found = shapes(each.folder / engine.STUDENT)
        tables = [shape for name, shape in found.items() if name.endswith("_embeddings.weight")]
        assert len(tables) == 3  # words, positions, sentence
        assert each.parameters == sum(map(np.prod, found.values()))
        assert each.embeddings == sum(map(np.prod, tables))
        assert each.stored_bytes == (each.folder / engine.STUDENT / "model.safetensors").stat().st_size


def test_tied_embeddings_count_once(tmp_path):
    """The masked model's decoder is its table of words."""
    tokenizer = models.load_tokenizer("tiny-1x32")
    network = models.load_masked("tiny-1x32", tokenizer)
    engine.save_pretrained(network, tokenizer, tmp_path / "network")
    size = engine.sizes(network, tmp_path / "network")
    tables = [s for n, s in shapes(tmp_path / "network").items() if n.endswith("_embeddings.weight")]
    assert size["embeddings"] == sum(map(np.prod, tables))
    assert size["parameters"] == sum(map(np.prod, shapes(tmp_path / "network").values()))


def test_the_report_takes_its_numbers_from_the_records_and_loads_nothing(record, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded a network"))
    record = dataclasses.replace(record, metrics={"validation/accuracy": 0.125, "test/accuracy": 0.25})
    found = report.report(record, measure=False)
    teacher, student = found.networks
    theirs = records.read_record(record.folder.parent / record.teacher)
    assert (teacher.name, student.name, found.measured_on) == ("teacher", "student", None)
    for network, source in ((teacher, theirs), (student, record)):
        assert network.parameters + network.embeddings == source.parameters
        assert network.scores == {"accuracy": source.metrics["validation/accuracy"]}
        assert (network.seconds, network.stored_bytes) == (source.seconds, source.stored_bytes)
    assert list(found.table.index) == ["teacher", "student"]


def test_records_from_before_are_looked_up_in_the_networks(record):
    old = dataclasses.replace(record, embeddings=None, stored_bytes=None)
    assert report.report(old, measure=False) == report.report(record, measure=False)


def test_latency_and_memory_are_measured_on_request(record):
    found = report.report(record, batch_sizes=(1, 4), seconds=0.05)
    for network in found.networks:
        assert [each.batch_size for each in network.latency] == [1, 4]
        assert all(0 < each.median < 5 and each.spread >= 0 for each in network.latency)
    teacher, student = found.networks
    assert teacher.memory > student.memory > 4 * (student.parameters + student.embeddings)
    assert {"ms, batch 1", "± ms, batch 4", "MiB at the peak"} <= set(found.table)
    assert "threads" in found.measured_on


def test_latency_is_the_time_of_a_call_shared_by_its_samples(encoded):
    batch = collate(encoded, [0, 1, 2, 3])
    found = report.latency(lambda batch: time.sleep(0.02), batch, seconds=0.2)
    assert found.median == pytest.approx(0.02 / 4, rel=0.3) and found.tokens == batch["input_ids"].shape[1]


def test_the_peak_is_that_of_the_profiler(record, encoded):
    """torch's profiler sees each allocation, those inside of kernels as well."""
    module = exports.load(record.folder / engine.STUDENT)
    batch = collate(encoded, range(32))
    weights = sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
    ours = report.peak_memory(module, batch) - weights
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        models.targets(module, batch)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert ours == pytest.approx(steps.max(), rel=0.1)


def test_a_batch_has_typical_lengths(encoded):
    lengths = encoded.lengths
    (middle,) = report.typical(encoded, 1)
    assert abs(float(lengths[middle]) - float(lengths.float().median())) <= 1
    many = report.typical(encoded, 100)
    assert len(set(many)) == 100
    assert float(lengths[many].float().mean()) == pytest.approx(float(lengths.float().mean()), rel=0.02)


def test_answers_are_in_the_order_of_the_split(record, encoded):
    module = exports.load(record.folder / engine.STUDENT)
    ours = report.answers(lambda batch: models.targets(module, batch).logits, encoded, batch_size=50)
    np.testing.assert_allclose(ours, models.predict(module, encoded), atol=1e-6)
    score = metrics.compute(["accuracy"], ours, encoded.labels.numpy())["accuracy"]
    assert score == record.metrics["validation/accuracy"]


def test_without_a_teacher_and_with_one_that_learns(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(report, "notice", told.append)
    small = QUICK | {"max_train": 64, "output_dir": str(tmp_path)}
    del small["teacher_epochs"]
    alone = runs.run(runs.configure(**{n: v for n, v in small.items() if n != "teacher"}, method="fine_tune"))
    assert [network.name for network in report.report(alone, measure=False).networks] == ["student"]
    mutual = runs.run(runs.configure(**small, method="dml"))
    mutual = dataclasses.replace(mutual, metrics=mutual.metrics | {"teacher/validation/accuracy": 0.875})
    teacher, student = report.report(mutual, measure=False).networks
    assert teacher.scores == {"accuracy": 0.875} and teacher.seconds is None
    assert student.scores == {"accuracy": mutual.metrics["validation/accuracy"]}
    assert teacher.parameters > student.parameters and not told


def test_a_teacher_that_was_there_is_scored_when_measured_and_a_busy_machine_told(record, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(report, "notice", told.append)
    monkeypatch.setattr(report, "busy", lambda: "9.0 processes want to compute on 2 cores")
    where = str(record.folder.parent / record.teacher / engine.STUDENT)
    config = QUICK | {"teacher": where, "teacher_epochs": 0, "output_dir": str(tmp_path), "max_train": 64}
    given = runs.run(runs.configure(**config))
    plain, *_ = report.report(given, measure=False).networks
    assert not told, "nothing is measured"
    measured, *_ = report.report(given, batch_sizes=(1,), seconds=0.01).networks
    assert [text for text in told if "busy (9.0 processes" in text and "measure again" in text] == told != []
    known = records.read_record(record.folder.parent / record.teacher)
    assert plain.scores == {} and plain.seconds is None and plain.stored_bytes == known.stored_bytes
    assert measured.scores == {"accuracy": known.metrics["validation/accuracy"]}


def test_what_cannot_be_reported_is_said(record, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(report, "notice", told.append)
    text = dataclasses.replace(record, config={"corpus": "mini-corpus"})
    with pytest.raises(ValueError, match="is a run on plain text: fine-tune its student"):
        report.report(text)
    orphan = dataclasses.replace(record, teacher="gone-12345678")
    assert [network.name for network in report.report(orphan, measure=False).networks] == ["student"]
    assert told == ["the teacher's run gone-12345678 is not beside that of its student: the report is without it"]
    with pytest.raises(OSError, match="there is no folder"):
        report.report(dataclasses.replace(record, folder=tmp_path / "no", teacher=None, embeddings=None), measure=False)


def test_it_moves_nothing(record):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    report.report(record, batch_sizes=(2,), seconds=0.01)
    assert torch.equal(before, torch.get_rng_state())
