"""Checkpoints: everything comes back, nothing is lost when writing fails, damage is named."""

import json
import random
import resource
import signal

import numpy as np
import pytest
import torch

from kdlib import checkpoints, files
from kdlib.checkpoints import CheckpointError
from tests import toy
from tests.test_learner import batch, loss_of


def trained(steps: int = 2):
    who = toy.student()
    for _ in range(steps):
        who.minimise(loss_of(who), batch())
    return who


def test_weights_optimiser_schedule_and_random_state_come_back(tmp_path):
    who, path = trained(), tmp_path / "c.safetensors"
    checkpoints.save(path, [who], {"step": 2, "history": [{"loss": 0.1 + 0.2}]})
    draws = torch.rand(3), random.random(), np.random.rand()
    after = who.minimise(loss_of(who), batch())

    other = toy.student(seed=1)
    state = checkpoints.load(path, [other])
    assert state == {"step": 2, "history": [{"loss": 0.1 + 0.2}]}
    again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(draws[0], again[0]) and draws[1:] == again[1:]
    assert other.minimise(loss_of(other), batch()) == after
    for ours, theirs in zip(other.module.parameters(), who.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert other.schedule.state_dict() == who.schedule.state_dict()


def test_nothing_is_pickled(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, [trained()], {"step": 2})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])["training"] == {"step": 2}


def test_others_may_read_a_checkpoint_as_any_new_file(tmp_path):
    path, plain = tmp_path / "c.safetensors", tmp_path / "plain"
    plain.touch()
    checkpoints.write_tensors(path, {"a": torch.ones(3)})
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A real limit on the size of files the process may write: the write fails half-way."""
    path = tmp_path / "c.safetensors"
    checkpoints.write_tensors(path, {"a": torch.ones(3)}, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(CheckpointError, match=r"could not write .*c\.safetensors.*intact; free some space"):
            checkpoints.write_tensors(path, {"a": torch.ones(100_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    tensors, state = checkpoints.read_tensors(path)
    assert state == {"step": 1} and torch.equal(tensors["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.write_tensors(tmp_path / "c.safetensors", {"a": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="choose another output_dir"):
        checkpoints.write_tensors(tmp_path / "gone" / "c.safetensors", {"a": torch.ones(1)})


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_damage_is_named_with_the_remedy(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    checkpoints.write_tensors(path, {"a": torch.ones(1000)}, {"step": 1})
    content = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match=r"c\.safetensors is damaged .*delete it, or run with resume=False"):
        checkpoints.read_tensors(path)


def test_another_network_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, [trained()], {"step": 2})
    other = toy.student()
    other.module = toy.network(labels=3)
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"another student \(2 weights differ"):
        checkpoints.load(path, [other])
    assert torch.equal(state, torch.get_rng_state())


def test_tied_weights_are_stored(tmp_path):
    path, weight = tmp_path / "c.safetensors", torch.arange(4.0)
    checkpoints.write_tensors(path, {"a": weight, "b": weight, "c": weight.view(2, 2).t()})
    tensors, _ = checkpoints.read_tensors(path)
    assert torch.equal(tensors["a"], tensors["b"]) and torch.equal(tensors["c"], weight.view(2, 2).t())
