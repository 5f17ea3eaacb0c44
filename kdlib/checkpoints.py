"""The complete state of a training run in one safetensors file, replaced atomically.

Tensors (weights, optimiser moments, random state) are stored as tensors; everything else is JSON in the file's header.
Nothing is pickled, so a checkpoint from elsewhere cannot run code.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdlib import files, processes
from kdlib.learner import Learner


class CheckpointError(OSError):
    """A checkpoint could not be written or read."""


def write_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any] | None = None) -> None:
    """Write tensors and a JSON state to `path`; whatever stood there stays intact until the new file is complete.

    Raises CheckpointError if the folder cannot be written or the disk is full.
    """
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    told = json.dumps(state or {})
    metadata = {"format": "pt", "state": told, "sha256": _digest(owned, told)}
    try:
        with files.written(path) as temporary:
            save_file(owned, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path}: {error}. The file that stood there before is intact; "
            "free some space or choose another output_dir, then run again to resume"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises CheckpointError, naming the file and the remedy, if it is missing or damaged, be it by one byte.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if metadata["sha256"] != _digest(tensors, metadata["state"]):
            raise ValueError("it does not hold what was written into it")
        return tensors, json.loads(metadata["state"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it, or run with resume=False") from error


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    """A checksum of tensors and state: the format has none of its own."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def save(path: Path, learners: Sequence[Learner], state: dict[str, Any]) -> None:
    """Write learners (weights, optimisers, schedules, loss scaler), the random state and `state` to `path`.

    Several processes have the same learners, which the first one writes, and each its own random state.
    """
    tensors: dict[str, Tensor] = {}
    saved: dict[str, Any] = {"training": state, "learners": {}}
    for learner in learners:
        for name, tensor in learner.module.state_dict().items():
            tensors[f"{learner.name}/module/{name}"] = tensor
        optimizer = learner.optimizer.state_dict()
        numbers: dict[str, Any] = {}
        for index, moments in optimizer["state"].items():
            for name, value in moments.items():
                if isinstance(value, Tensor):
                    tensors[f"{learner.name}/optimizer/{index}/{name}"] = value
                else:
                    numbers[f"{index}/{name}"] = value
        scaler = learner.accelerator.scaler
        saved["learners"][learner.name] = {
            "groups": optimizer["param_groups"],
            "numbers": numbers,
            "schedule": learner.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for number, device_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda/{number}"] = device_state
    legacy = np.random.get_state(legacy=False)
    twister = legacy["state"]
    drawn = [legacy["bit_generator"], twister["key"].tolist(), twister["pos"], legacy["has_gauss"], legacy["gauss"]]
    saved["random"] = {"python": random.getstate(), "numpy": drawn}
    for number, streams in enumerate(processes.told(_streams())):
        if number > 0:
            tensors |= {f"random/{number}/{name}": state for name, state in streams.items()}
    processes.once(lambda: write_tensors(path, tensors, saved))


def load(path: Path, learners: Sequence[Learner]) -> dict[str, Any]:
    """Put learners and the random state back to where `save` found them; return the saved `state`.

    Raises CheckpointError if the file is damaged or belongs to other networks; nothing is changed then.
    """
    tensors, saved = read_tensors(path)
    restored = [(learner, *_learner_state(path, learner, tensors, saved)) for learner in learners]
    for learner, weights, optimizer, rest in restored:
        learner.module.load_state_dict(weights)
        learner.optimizer.load_state_dict(optimizer)
        learner.schedule.load_state_dict(rest["schedule"])
        if learner.accelerator.scaler is not None and rest["scaler"] is not None:
            learner.accelerator.scaler.load_state_dict(rest["scaler"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random/cuda/")]
    if processes.rank() > 0:
        own = f"random/{processes.rank()}/"
        torch.set_rng_state(tensors[f"{own}torch"])
        if torch.cuda.is_available() and f"{own}cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{own}cuda"])
    else:
        torch.set_rng_state(tensors["random/torch"])
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
    version, numbers, gauss = saved["random"]["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["random"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    return saved["training"]


def _streams() -> dict[str, Tensor]:
    """The random state of this process and its GPU."""
    own = {"torch": torch.get_rng_state()}
    return own | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _learner_state(
    path: Path, learner: Learner, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    prefix = f"{learner.name}/module/"
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    expected = learner.module.state_dict()
    differing = [name for name in expected.keys() | weights.keys() if not _same_shape(expected, weights, name)]
    if learner.name not in saved["learners"] or differing:
        raise CheckpointError(
            f"{path} belongs to another {learner.name} ({len(differing)} weights differ in name or shape): "
            "choose another output_dir, or run with resume=False"
        )
    rest = saved["learners"][learner.name]
    moments: dict[int, dict[str, Any]] = {}
    prefix = f"{learner.name}/optimizer/"
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, moment = name.removeprefix(prefix).split("/")
            moments.setdefault(int(index), {})[moment] = tensor
    for name, number in rest["numbers"].items():
        index, moment = name.split("/")
        moments.setdefault(int(index), {})[moment] = number
    return weights, {"state": moments, "param_groups": rest["groups"]}, rest


def _same_shape(expected: dict[str, Tensor], found: dict[str, Tensor], name: str) -> bool:
    return name in expected and name in found and expected[name].shape == found[name].shape


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of a module's weights on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
