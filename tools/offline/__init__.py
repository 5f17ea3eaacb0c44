"""No network while the book is made and tested: an attempt to reach another machine is refused and written down."""

import os
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)


def refuse_network() -> None:
    """Let every Python that this process starts refuse to reach another machine, as sitecustomize.py says.

    HF_HUB_OFFLINE is left as a reader has it: the library has to do without the network by itself.
    """
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        del os.environ[name]  # a proxy on this machine would hide whom it is asked for
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != HERE]
    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, *others])
