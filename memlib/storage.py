"""Where files lie: a local folder, NFS or an object store, behind one small interface.

Everything memlib keeps (result tables, checkpoints) is written through here, so that "atomic"
is decided in one place: a local file is written beside its name, flushed to disk and renamed; an
object store gets one PUT. Readers therefore see a whole file or none.
"""

from __future__ import annotations

import errno
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from memlib.errors import InputError

_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Storage:
    """A folder of a file system; `location` is what the user called it."""

    location: str
    filesystem: fs.FileSystem
    root: str

    @property
    def is_local(self) -> bool:
        """Whether the folder is reached by the operating system's own file calls."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Put `data` at `path` (relative, "/" between parts), whole or not at all.

        Raises:
            OSError: the disk is full or refuses; nothing is left at `path` that was not there before.
        """
        target = f"{self.root}/{path}"
        if self.is_local:
            _write_local(Path(target), data)
            return
        with self.filesystem.open_output_stream(target) as sink:
            sink.write(data)

    def read(self, path: str) -> bytes:
        """Return the content of `path`; raises FileNotFoundError if there is none."""
        with self.filesystem.open_input_stream(f"{self.root}/{path}") as source:
            return source.read()

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in `folder`, unfinished ones left out; empty if there is no folder."""
        selector = fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.type == fs.FileType.File and not i.base_name.startswith("."))

    def exists(self, path: str) -> bool:
        """Return whether there is a file at `path`."""
        return self.filesystem.get_file_info(f"{self.root}/{path}").type == fs.FileType.File

    def delete(self, path: str) -> None:
        """Remove the file at `path`; a file that is not there is fine."""
        if self.exists(path):
            self.filesystem.delete_file(f"{self.root}/{path}")

    def modified(self, path: str) -> int | None:
        """Return when the file at `path` was last written, in nanoseconds; None if there is none."""
        info = self.filesystem.get_file_info(f"{self.root}/{path}")
        return info.mtime_ns if info.type == fs.FileType.File else None

    def remove_unfinished(self, folder: str) -> None:
        """Remove what writers that were killed left in `folder`; nobody may be writing there."""
        if self.is_local:
            for partial in Path(self.root, folder).glob(f".*{_PARTIAL}*"):
                partial.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Return the space left for a local folder, None for an object store."""
        if not self.is_local:
            return None
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize


def open_storage(location: str | Path) -> Storage:
    """Return the storage at a local path or a URI such as `s3://bucket/prefix`; nothing is read or written yet.

    Raises:
        InputError: the location cannot be understood.
    """
    text = str(location)
    try:
        if "://" not in text:
            return Storage(text, fs.LocalFileSystem(), str(Path(text).expanduser().absolute()))
        filesystem, root = fs.FileSystem.from_uri(text)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"location {text!r} is not understood: {error}. Give a folder or s3://BUCKET/FOLDER."
        ) from error
    return Storage(text, filesystem, root)


def check_writable(storage: Storage) -> None:
    """Write and remove a small file; raises InputError if that fails."""
    probe = f".write_test_{uuid.uuid4().hex}"
    try:
        storage.write(probe, b"memlib")
        storage.delete(probe)
    except OSError as error:
        raise InputError(f"{storage.location!r} cannot be written: {error}. Give a folder you may write to.") from error


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` (or what caused it) says that the disk or quota is full."""
    full = {errno.ENOSPC, errno.EDQUOT}
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        seen = seen.__cause__
    return False


def _write_local(target: Path, data: bytes | memoryview) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{_PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
