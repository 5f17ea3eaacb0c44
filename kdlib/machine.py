"""What the numbers of a run can depend on besides its parameters: versions, processor, device, commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import kdlib
from kdlib import processes


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers of a run can depend on besides its configuration: versions, processor, threads, device."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy")
    return {
        "kdlib": kdlib.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        **({"processes": str(processes.world_size())} if processes.world_size() > 1 else {}),
    }


def processor() -> str:
    """The processor's model: two models with the same instructions may still round sums differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def busy() -> str:
    """A sentence where more processes want to compute than the cores that this one may use can serve, else ""."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"{load:.1f} processes want to compute on {cores} cores" if load > 1.25 * cores else ""


def git_commit() -> str | None:
    """The commit of the repository that kdlib is imported from, with "+" if files differ; None outside a repository."""
    git = ["git", "-C", str(Path(kdlib.__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
