import errno
import os

import pytest

from memlib.errors import InputError
from memlib.storage import check_writable, is_disk_full, open_storage


def test_a_file_is_written_whole_read_listed_and_deleted(tmp_path):
    storage = open_storage(tmp_path / "new" / "folder")
    storage.write("a/b.bin", b"12")
    assert storage.read("a/b.bin") == b"12"
    assert storage.names("a") == ["b.bin"]
    assert storage.exists("a/b.bin")
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    assert storage.names("a") == []
    assert storage.names("nowhere") == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    storage.write("x", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write("x", b"new")
    assert is_disk_full(caught.value)
    assert storage.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_disk_is_only_called_full_when_it_is():
    assert not is_disk_full(ValueError("x"))
    chained = RuntimeError("outer")
    chained.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_disk_full(chained)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(open_storage(tmp_path / "file" / "folder"))


def test_a_location_that_is_not_understood_is_refused():
    with pytest.raises(InputError, match="location 'ftpx://a' is not understood"):
        open_storage("ftpx://a")
