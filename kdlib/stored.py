"""Networks as files: where a name leads, whether the files there are sound, and a digest of what they hold.

Nothing is loaded here and nothing is run: headers and sizes are compared, so that a copy that was cut short or a file
that Git LFS has not fetched is named before a library meets it.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files in which transformers looks for weights; the first one that is there counts."""

_TOKENIZER_FILE = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab.*\.(txt|json|bpe)|merges\.txt"
    r"|.+\.(model|tiktoken)|bpe\.codes"
)
_LFS = b"version https://git-lfs"
# What says where or by which version something was written, or is overruled by `models.load`, not what it computes.
_NOT_CONTENT = (
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "dtype", "torch_dtype", "is_local",
    "local_files_only", "tokenizer_file", "vocab_file",
)  # fmt: skip


def find(name: str) -> str:
    """The folder that `name` stands for, "~" expanded, or `name` itself if it can only be a hub id.

    Raises OSError for a path that is no folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path) if str(name).startswith("~") else str(name)
    if path.is_file():
        raise OSError(f"cannot load {str(name)!r}: it is a file. Give the folder that it lies in")
    spelled = str(name)
    only_a_path = path.is_absolute() or spelled.startswith((".", "~")) or spelled.count("/") > 1 or "\\" in spelled
    if only_a_path or _record(path).exists():
        remedy = _remedy(path, "give the folder that save_pretrained wrote, 'tiny-<layers>x<hidden>', or 'minilm'")
        raise OSError(f"cannot load {spelled!r}: there is no folder {path.absolute()}. To mend it, {remedy}")
    return spelled


def is_folder(location: str) -> bool:
    """Whether the answer of `find` is a folder; otherwise it is a hub id."""
    return Path(location).is_dir()


def check_network(name: str, folder: Path) -> None:
    """Raise OSError unless `folder` holds a configuration and weights that are whole, as far as sizes tell.

    The message names the file, what is wrong with it and what to do.
    """
    _read_json(name, folder / CONFIG)
    for path in _weight_files(name, folder):
        start, size = _check_whole(name, path), f"it has {path.stat().st_size:,} bytes"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass  # the library compares the header with the size
            except (SafetensorError, OSError) as error:
                _refuse(name, path, f"is cut short or damaged: {size}, and its library says: {error}")
        elif path.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(path):
            _refuse(name, path, f"is cut short: {size} and no end")


def check_tokenizer(name: str, folder: Path) -> None:
    """Raise OSError if a file of the tokenizer in `folder` is empty, or a pointer of Git LFS."""
    for path in tokenizer_files(folder):
        if path.name != "merges.txt":  # a vocabulary of single characters has none
            _check_whole(name, path)


def _weight_files(name: str, folder: Path) -> list[Path]:
    """The files of weights that transformers reads from `folder`: one, or an index and what it lists.

    Raises OSError if there are none, or if one that the index lists is missing.
    """
    chosen = _read_json(name, folder / CONFIG).get("transformers_weights")
    first = next((path for path in (folder / file for file in (chosen, *_WEIGHTS) if file) if path.exists()), None)
    if first is None:
        links = [path for path in (folder / file for file in _WEIGHTS) if path.is_symlink()]
        if links:
            _refuse(name, links[0], "is a link to a file that is not there")
        remedy = _remedy(folder, "save the network there with save_pretrained, or copy the weights beside config.json")
        raise OSError(
            f"cannot load {str(name)!r}: it is a folder that holds no complete model: it has none of the files "
            f"{', '.join(_WEIGHTS)}. To mend it, {remedy}"
        )
    if not first.name.endswith(".index.json"):
        return [first]
    shards = [folder / file for file in sorted(set(_read_json(name, first).get("weight_map", {}).values()))]
    absent = [path for path in shards if not path.exists()]
    if absent or not shards:
        _refuse(name, absent[0] if absent else first, f"is missing, though {first.name} lists it" if absent else _EMPTY)
    return [first, *shards]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in `folder` that can belong to a tokenizer, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _TOKENIZER_FILE.fullmatch(path.name))


def digest(name: str, folder: Path) -> str:
    """The first 16 hexadecimal digits of SHA-256 over what `models.load` and `models.load_tokenizer` read there.

    That is the weights' bytes, the configuration apart from what only says who wrote it, and the tokenizer's files;
    neither the folder's path nor its other files nor their times.  Files that have not changed are read once.

    Raises OSError as `check_network` does.
    """
    check_network(name, folder)
    parts = [(CONFIG, _canonical(name, folder / CONFIG))]
    parts += [(path.name, sha256(path)) for path in _weight_files(name, folder)]
    for path in tokenizer_files(folder):
        small = path.name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        parts.append((path.name, _canonical(name, path) if small else sha256(path)))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; read once as long as its size and times stay what they are."""
    status = path.stat()
    return _sha256(str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@cache
def _sha256(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(name: str, location: str, error: Exception) -> OSError:
    """What went wrong when a library loaded `location`, as an error that names the network and what to do."""
    text = str(error)
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__).strip()
    if "trust_remote_code" in text:
        return OSError(
            f"cannot load {str(name)!r}: it brings code of its own (auto_map in its config.json), which is never run "
            "here. Take a network of a kind that transformers knows, such as a BERT, RoBERTa or Electra"
        )
    if "does not support an attention implementation" in text:
        return OSError(
            f"cannot load {str(name)!r}: networks of its kind have no attention by torch's scaled dot product, which "
            f"is used here. Take a BERT, RoBERTa, DistilBERT, ALBERT or Electra. The library said: {line}"
        )
    if not is_folder(location):
        if "weights_only" in text:
            return OSError(f"cannot load {str(name)!r}: its weights are {_PICKLE}")
        if not isinstance(error, OSError):
            return OSError(
                f"cannot load {str(name)!r}: it is of a kind that transformers does not know, or its files in the "
                f"cache of the hub are damaged: then delete its folder in {HF_HUB_CACHE} and load it again. The "
                f"library said: {line}"
            )
        return OSError(
            f"cannot load {str(name)!r}: it is neither a folder here nor reachable. Give 'tiny-<layers>x<hidden>', "
            "'minilm' (offline), a folder written by save_pretrained, or a hub id while the hub can be reached. "
            f"The library said: {line}"
        )
    for path, what in _unreadable(Path(location)):
        return OSError(f"cannot load {str(name)!r}: {path} {what}")
    remedy = _remedy(Path(location), "mend its config.json, or give a folder written by save_pretrained")
    return OSError(
        f"cannot load {str(name)!r}: transformers can make nothing of the folder {location}. It said: {line} To "
        f"mend it, {remedy}"
    )


_EMPTY = "is empty"
_PICKLE = (
    "a pickle that is damaged or holds more than tensors; it is not read, because reading it could run code. Have the "
    "weights written as model.safetensors where they come from: save_pretrained does so"
)


def _unreadable(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files in `folder` that a library cannot take apart, and what they are."""
    jsons = [path for path in (folder / CONFIG, *folder.glob("*.index.json")) if path.exists()]
    for path in jsons + [path for path in tokenizer_files(folder) if path.suffix == ".json"]:
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield path, f"is not JSON: it is damaged. To mend it, {_remedy(folder, 'copy it again')}"
    if not any((folder / file).exists() for file in _WEIGHTS[:2]):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            try:
                torch.load(path, map_location="meta", weights_only=True)
            except Exception:  # torch has many, and their texts advise to read the file without a guard
                yield path, f"is {_PICKLE}"


def _record(folder: Path) -> Path:
    """The record of the run that wrote `folder`, if a run did: its networks lie beside its record."""
    return folder.parent / "record.json" if folder.name in ("student", "teacher") else folder / "no record"


def _remedy(folder: Path, otherwise: str) -> str:
    record = _record(folder)
    if record.exists():
        return f"delete {record} and run again: the run's record is there, but its {folder.name} is gone or damaged"
    return otherwise


def _refuse(name: str, path: Path, what: str, remedy: str = "copy it again") -> None:
    raise OSError(f"cannot load {str(name)!r}: {path} {what}. To mend it, {_remedy(path.parent, remedy)}")


def _check_whole(name: str, path: Path) -> bytes:
    """How the file begins.  Raises OSError for an empty one, one of zeros and a pointer that Git LFS has left."""
    with open(path, "rb") as file:
        start = file.read(256)
    if start.startswith(_LFS):
        _refuse(name, path, "is a pointer of Git LFS, not the file itself", f"run  git lfs pull  in {path.parent}")
    if not start:
        _refuse(name, path, _EMPTY)
    if not start.strip(b"\0"):
        _refuse(name, path, "begins with zeros: what wrote or copied it was broken off")
    return start


def _read_json(name: str, path: Path) -> dict[str, Any]:
    if not path.exists():
        remedy = _remedy(path.parent, "save the network there with save_pretrained")
        raise OSError(
            f"cannot load {str(name)!r}: it is a folder that holds no complete model: {path} is missing. To mend it, "
            f"{remedy}"
        )
    _check_whole(name, path)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        _refuse(name, path, f"is not JSON ({error})")
    if not isinstance(values, dict):
        _refuse(name, path, "is not a JSON object")
    return values


def _canonical(name: str, path: Path) -> str:
    """A JSON file without what is not content; neither the order of its keys nor of the architectures counts."""
    values = {key: value for key, value in _read_json(name, path).items() if key not in _NOT_CONTENT}
    if isinstance(values.get("architectures"), list):
        values["architectures"] = sorted(values["architectures"], key=str)
    return json.dumps(values, sort_keys=True)
