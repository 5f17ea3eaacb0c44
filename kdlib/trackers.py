"""Following a run while it trains: its history, row by row, in tensorboard, trackio or wandb, through accelerate.

    python -m kdlib run task=mini-sst2 log_with=tensorboard
    tensorboard --logdir _runs

Nothing is followed unless a run asks, and then it stays on this machine: wandb is put into its offline mode unless
WANDB_MODE says otherwise, trackio keeps a data base of its own, tensorboard's files lie in the run's folder.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from kdlib.settings import refuse

Tracker = Literal["tensorboard", "trackio", "wandb"]
TRACKED = "tracked"
"""The folder of a run that holds what a tracker writes into files."""


def check(name: Tracker | None) -> None:
    """Raise ConfigurationError, which says what to install, unless the tracker `name` is there; None always is."""
    if name is not None and not filter_trackers([name], "."):
        refuse([f"log_with is {name!r}, which is not installed: pip install {name}, or leave log_with out"])


@contextmanager
def following(
    accelerator: Accelerator, name: Tracker | None, folder: Path, identity: Mapping[str, Any]
) -> Iterator[None]:
    """While the block trains, `accelerator.log` goes to the tracker `name`; for None it goes nowhere.

    `folder` is the run's, after which the tracker calls it; `identity` is stored with it.  A run that goes on from a
    checkpoint adds to what tensorboard has.
    """
    if name is None:
        yield
        return
    check(name)
    os.environ.setdefault("WANDB_MODE", "offline")
    accelerator.log_with = filter_trackers([name], folder)
    accelerator.project_configuration.set_directories(str(folder))
    project = TRACKED if name == "tensorboard" else "kdlib"
    if name == "wandb":
        (folder / TRACKED).mkdir(exist_ok=True)
    own = {"wandb": {"name": folder.name, "dir": str(folder / TRACKED)}, "trackio": {"name": folder.name}}
    kept = {key: value for key, value in identity.items() if isinstance(value, bool | int | float | str)}
    accelerator.init_trackers(project, kept, own)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # `end_training` would part the processes as well, which go on
            tracker.finish()
        accelerator.trackers = []
