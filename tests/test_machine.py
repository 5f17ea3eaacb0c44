"""What a record says of the machine."""

import platform
from pathlib import Path

import pytest
import torch

import kdlib
from kdlib import machine


def test_the_processor_has_a_name_on_every_system(monkeypatch):
    assert machine.processor()

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.processor()


@pytest.mark.parametrize(("load", "said"), [(9.0, "9.0 processes want to compute on 4 cores"), (4.9, "")])
def test_a_machine_is_busy_where_there_is_more_to_compute_than_cores(monkeypatch, load, said):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {1, 2, 3, 4})
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 99.0, 99.0))
    assert machine.busy() == said


def test_git_commit_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(kdlib, "__file__", str(tmp_path / "kdlib" / "__init__.py"))
    assert machine.git_commit() is None


def test_the_environment_says_what_numbers_can_depend_on():
    found = machine.environment(torch.device("cpu"))
    assert (found["torch"], found["python"], found["device"]) == (torch.__version__, platform.python_version(), "cpu")
    assert found["threads"] == str(torch.get_num_threads()) and found["processor"] == machine.processor()
    assert all(isinstance(value, str) and value for value in found.values())
