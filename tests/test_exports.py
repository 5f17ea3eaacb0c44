"""Exported students: that a file gives the network's own answers for batches of any shape, and says what is missing."""

import importlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdlib import engine, exports, glue, metrics, models, report, runs


@pytest.fixture(scope="module")
def record(finished_run):
    return finished_run


@pytest.fixture(scope="module")
def folder(record):
    return record.folder / engine.STUDENT


@pytest.fixture(scope="module")
def onnx(folder):
    pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    return exports.to_onnx(folder)


@pytest.fixture(scope="module")
def encoded(record):
    data = runs.load_data(runs.configure(**record.config))
    return glue.encode(data.evaluation["validation"], data.task, models.load_tokenizer("tiny-2x64"))


@pytest.mark.parametrize(("samples", "tokens"), [(1, 3), (1, 64), (7, 9), (32, 20)])
def test_an_onnx_file_gives_torchs_logits_for_any_batch_and_length(folder, onnx, samples, tokens):
    network = exports.load(folder)
    generator = torch.Generator().manual_seed(samples)
    batch = {"input_ids": torch.randint(5, 80, (samples, tokens), generator=generator)}
    lengths = torch.randint(2, tokens + 1, (samples, 1), generator=generator)
    batch["attention_mask"] = (torch.arange(tokens) < lengths).long()
    batch["token_type_ids"] = torch.randint(0, 2, (samples, tokens), generator=generator)
    expected = models.targets(network, batch).logits.numpy()
    np.testing.assert_allclose(exports.onnx_logits(onnx)(batch), expected, atol=1e-5)


def test_an_onnx_file_scores_what_the_record_says(record, onnx, encoded):
    outputs = report.answers(exports.onnx_logits(onnx), encoded)
    assert np.abs(outputs - models.predict(exports.load(onnx.parents[1]), encoded)).max() < 1e-5
    score = metrics.compute(["accuracy"], outputs, encoded.labels.numpy())["accuracy"]
    assert score == record.metrics["validation/accuracy"]


def test_eight_bits_are_smaller_and_close_and_in_the_report(record, folder, onnx, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = exports.to_int8(folder)
    assert list(tmp_path.iterdir()) == []  # onnxruntime's intermediate files
    assert small.stat().st_size < 0.6 * onnx.stat().st_size
    outputs, exact = (report.answers(exports.onnx_logits(path), encoded) for path in (small, onnx))
    assert 1e-6 < np.abs(outputs - exact).max() < 0.2
    found = {network.name: network for network in report.report(record, batch_sizes=(2,), seconds=0.01).networks}
    assert list(found) == ["teacher", "student", "student, ONNX", "student, int8"]
    assert found["student, int8"].stored_bytes == small.stat().st_size
    score = metrics.compute(["accuracy"], outputs, encoded.labels.numpy())["accuracy"]
    assert found["student, int8"].scores == {"accuracy": score} and found["student, int8"].memory is None


def test_the_files_tell_nothing_of_this_machine(onnx):
    assert not re.search(rb"site-packages|\.py\b", onnx.read_bytes())
    assert os.getcwd().encode() not in onnx.read_bytes()


def test_exports_do_not_change_what_a_network_is(folder, onnx):
    before = models.content(str(folder))
    (folder / "README.md").write_text("a card")
    assert models.content(str(folder)) == before


def test_another_kind_of_network_without_segments(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=90, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=40)
    with models.quiet():
        DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    path = exports.to_onnx(tmp_path)
    ones = torch.ones(4, 12, dtype=torch.int64)
    batch = {"input_ids": torch.randint(0, 90, (4, 12)), "attention_mask": ones, "token_type_ids": 0 * ones}
    expected = models.targets(exports.load(tmp_path), batch).logits.numpy()
    np.testing.assert_allclose(exports.onnx_logits(path)(batch), expected, atol=1e-5)


def test_a_file_that_gives_other_logits_is_not_left_behind(folder, onnx, tmp_path, monkeypatch):
    """Whoever exports with another torch must not go on with wrong numbers."""
    network = shutil.copytree(folder, tmp_path / "network", ignore=shutil.ignore_patterns("onnx"))
    logits = exports.onnx_logits
    monkeypatch.setattr(exports, "onnx_logits", lambda path: lambda batch: logits(path)(batch) + 0.01)
    with pytest.raises(ValueError, match=r"gives logits that are 1\.0e-02 from torch's: not written"):
        exports.to_onnx(network)
    assert list((network / "onnx").iterdir()) == []


def test_without_the_extra_an_error_says_what_to_install(folder, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", missing)
    for export in (exports.to_onnx, exports.to_int8, exports.onnx_logits):
        with pytest.raises(ModuleNotFoundError, match=r"an export needs the package onnx\w+: pip install 'kdlib\[exp"):
            export(folder)


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        exports.load(tmp_path)
    with pytest.raises(OSError, match=r"config\.json"):
        exports.load(Path(tmp_path) / "nowhere")
