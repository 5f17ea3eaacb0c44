"""A file or a folder appears complete or not at all."""

import os

import pytest

from kdlib import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_stood_there_is_intact_until_the_block_ends(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with files.written(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
        assert temporary.name == f".note.txt.{os.getpid()}.tmp"  # a run removes such leftovers from its folder
    assert path.read_text() == "new" and names(tmp_path) == ["note.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_raises_leaves_what_was_there(tmp_path, error, folder):
    path = tmp_path / "kept"
    (path.mkdir if folder else path.touch)()
    with pytest.raises(error), files.written(path) as temporary:
        if folder:
            temporary.mkdir()
            (temporary / "half").touch()
        else:
            temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["kept"] and (not folder or names(path) == [])


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "model"
    for name in ("first", "second"):
        with files.written(path) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / name).touch()
    assert names(path / "deep") == ["second"] and names(tmp_path) == ["model"]


def test_with_keep_the_faster_one_stays(tmp_path):
    path = tmp_path / "cache"
    with files.written(path, keep=True) as temporary:
        temporary.mkdir()
        (temporary / "slower").touch()
        path.mkdir()
        (path / "faster").touch()
    assert names(path) == ["faster"] and names(tmp_path) == ["cache"]
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError), files.written(blocked, keep=True) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["cache", "file"]


def test_leftovers_of_a_process_with_the_same_number_are_no_obstacle(tmp_path):
    path = tmp_path / "model"
    stale = tmp_path / f".model.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "old").touch()
    with files.written(path) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["model"] and names(path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with files.written(tmp_path / "one") as temporary:
            temporary.touch(0o600)
        with files.written(tmp_path / "many") as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / "weights").touch(0o600)
        (tmp_path / "any").touch()
        wanted = (tmp_path / "any").stat().st_mode
        assert (tmp_path / "one").stat().st_mode == (tmp_path / "many" / "deep" / "weights").stat().st_mode == wanted
        assert os.umask(mask) == mask  # as it was
    finally:
        os.umask(before)


def test_text_is_written_in_utf_8(tmp_path):
    files.write_text(tmp_path / "text", "ε ≤ 1\n")
    assert (tmp_path / "text").read_bytes() == "ε ≤ 1\n".encode()


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "gone" / "text", "")
