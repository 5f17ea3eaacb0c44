"""Files of networks: damage is found before a library meets it, and named with what can be done."""

import io
import json
import pickle
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from kdlib import miniglue, models, stored
from tests import toy


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("sound")
    with models.quiet():
        toy.network().save_pretrained(folder)
    miniglue.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def check(folder) -> None:
    stored.check_network("N", Path(folder))


def as_bin(folder: Path, **options) -> Path:
    """Store the weights as pytorch_model.bin instead."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin", **options)
    path.unlink()
    return folder / "pytorch_model.bin"


def as_shards(folder: Path) -> list[Path]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number, name in enumerate(tensors):
        file = f"model-{number % 3}.safetensors"
        where[name] = file
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sorted(folder.glob("model-*.safetensors"))


class TestSoundFiles:
    @pytest.mark.parametrize("store", [lambda folder: None, as_bin, as_shards])
    def test_they_pass(self, store, copied):
        store(copied)
        check(copied)
        stored.check_tokenizer("N", copied)

    def test_those_of_the_book_pass(self, root):
        for folder in sorted((root / "data" / "teachers").iterdir()):
            check(folder)
            stored.check_tokenizer("N", folder)

    def test_a_legacy_pickle_and_no_tensors_at_all_pass(self, copied):
        (copied / "model.safetensors").write_bytes(save({}))
        check(copied)
        save_file({"a": torch.ones(2)}, copied / "model.safetensors")
        as_bin(copied, _use_new_zipfile_serialization=False)
        check(copied)

    @settings(max_examples=25)
    @given(data=st.data())
    def test_safetensors_are_judged_as_their_library_does(self, data, tmp_path_factory):
        """Whatever is cut off, put behind or written into the length of the header."""
        shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=4))
        held = bytearray(save({f"t{i}": torch.ones(shape) for i, shape in enumerate(shapes)}))
        change = data.draw(st.sampled_from(["none", "cut", "longer", "length", "byte"]))
        if change == "cut":
            held = held[: data.draw(st.integers(0, len(held) - 1))]
        elif change == "longer":
            held += b"x" * data.draw(st.integers(1, 9))
        elif change == "length":
            held[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 200)))
        elif change == "byte":
            at = data.draw(st.integers(0, len(held) - 1))
            held[at] = data.draw(st.integers(0, 255))
        folder = tmp_path_factory.mktemp("any")
        (folder / "config.json").write_text("{}")
        path = folder / "model.safetensors"
        path.write_bytes(held)
        try:
            load_file(path)
            readable = True
        except (SafetensorError, OSError):
            readable = False
        if readable:
            check(folder)  # nothing that loads is refused
        elif change in ("cut", "longer"):
            with pytest.raises(
                OSError, match=r"cannot load 'N': .*model\.safetensors (is cut short|is empty|is damaged)"
            ):
                check(folder)


class TestDamage:
    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                "is a pointer of Git LFS.*git lfs pull",
            ),
            (b"", "is empty.*copy it again"),
            (bytes(5000), "begins with zeros.*copy it again"),
        ],
    )
    def test_it_is_named_with_its_remedy(self, file, content, said, copied):
        (copied / file).write_bytes(content)
        judge = stored.check_tokenizer if file == "tokenizer.json" else stored.check_network
        with pytest.raises(OSError, match=rf"cannot load 'N': {copied / file} {said}"):
            judge("N", copied)

    def test_what_is_missing_is_named(self, copied):
        shards = as_shards(copied)
        shards[1].unlink()
        with pytest.raises(OSError, match=rf"{shards[1]} is missing, though model.safetensors.index.json lists it"):
            check(copied)
        (copied / "model.safetensors.index.json").unlink()
        with pytest.raises(OSError, match=r"holds no complete model: it has none of the files model.safetensors"):
            check(copied)
        (copied / "model.safetensors").symlink_to(copied / "gone")
        with pytest.raises(OSError, match="is a link to a file that is not there"):
            check(copied)
        (copied / "config.json").unlink()
        with pytest.raises(OSError, match=r"holds no complete model: .*config\.json is missing"):
            check(copied)

    def test_a_cut_archive_and_other_json(self, copied):
        path = as_bin(copied)
        path.write_bytes(path.read_bytes()[:-200])
        assert not zipfile.is_zipfile(path)
        with pytest.raises(OSError, match=r"pytorch_model\.bin is cut short"):
            check(copied)
        for text, said in [("{", "is not JSON"), ("[1]", "is not a JSON object"), ("\xff", "is not JSON")]:
            (copied / "config.json").write_bytes(text.encode("latin1"))
            with pytest.raises(OSError, match=rf"config\.json {said}"):
                check(copied)

    def test_in_the_folder_of_a_run_the_remedy_is_to_run_again(self, sound, tmp_path):
        for name in ("student", "teacher"):
            folder = tmp_path / name
            with pytest.raises(OSError, match="there is no folder") as found:
                stored.find(str(folder))
            assert "record" not in str(found.value)
        (tmp_path / "record.json").write_text("{}")
        said = rf"delete {tmp_path / 'record.json'} and run again"
        with pytest.raises(OSError, match=said):
            stored.find(str(tmp_path / "student"))
        folder = Path(shutil.copytree(sound, tmp_path / "student"))
        check(folder)
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(OSError, match=said):
            check(folder)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestPickles:
    @pytest.mark.parametrize("kind", ["archive", "legacy", "plain", "text", "tensors and more"])
    def test_they_are_not_run_and_nobody_is_told_to_run_them(self, kind, copied, tmp_path):
        payload, path = Payload(tmp_path / "ran"), as_bin(copied)
        buffer = io.BytesIO()
        if kind == "plain":
            pickle.dump(payload, buffer)
        elif kind == "text":
            buffer.write(b"this is no pickle")
        else:
            given_ = {"bert.pooler.dense.bias": torch.ones(32), "more": payload} if "more" in kind else payload
            torch.save(given_, buffer, _use_new_zipfile_serialization=kind != "legacy")
        path.write_bytes(buffer.getvalue())
        task, words = toy.TASK, miniglue.tokenizer()
        for load in (lambda: models.load(str(copied), task, words), lambda: models.load_masked(str(copied), words)):
            with pytest.raises(
                OSError, match=rf"{path} is a pickle that .*model\.safetensors.*save_pretrained"
            ) as found:
                load()
            shown, error = "", found.value
            while error is not None:  # as a traceback would show it
                shown += str(error)
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
            assert "weights_only" not in shown
        assert not (tmp_path / "ran").exists()

    def test_those_of_tensors_alone_load(self, tmp_path):
        network = toy.network(labels=2)
        folder = tmp_path / "net"
        with models.quiet():
            network.save_pretrained(folder)
        as_bin(folder)
        words = miniglue.tokenizer()
        with pytest.raises(ValueError, match="has 40 word embeddings, but the tokenizer"):  # that is, it was read
            models.load(str(folder), toy.TASK, words)


class TestFind:
    def test_a_folder_a_hub_id_and_what_can_be_neither(self, sound, monkeypatch, tmp_path):
        assert stored.find(str(sound)) == str(sound) and stored.is_folder(str(sound))
        for name in ("bert-base-uncased", "some/network"):
            assert stored.find(name) == name and not stored.is_folder(name)
        for name in ("/no/such", "./no", "../no", "~/no", "a/b/c", "C:\\nets\\a"):
            with pytest.raises(OSError, match=rf"cannot load {re.escape(repr(name))}: there is no folder"):
                stored.find(name)
        with pytest.raises(OSError, match=r"it is a file. Give the folder"):
            stored.find(str(sound / "config.json"))
        monkeypatch.setenv("HOME", str(sound.parent))
        assert stored.find(f"~/{sound.name}") == str(sound)
        monkeypatch.chdir(sound.parent)
        assert stored.find(sound.name) == sound.name


class TestExplain:
    def test_for_a_hub_id_too_nobody_is_told_to_read_pickles_or_to_run_code(self):
        for text, said in [
            ("Weights only load failed. Set weights_only=False", "its weights are a pickle that"),
            ("contains custom code: set trust_remote_code=True", "it brings code of its own"),
            ("Error while deserializing header", "damaged: then delete its folder in"),
        ]:
            error = str(stored.explain("some/network", "some/network", RuntimeError(text)))
            assert said in error and "=" not in error.replace("HF_", "")
