"""Where files lie: a local folder, NFS or an object store, behind one small interface.

Everything memlib keeps (result tables, checkpoints) is written through here, so that "atomic"
is decided in one place: a local file is written beside its name, flushed to disk and renamed; an
object store gets one PUT. Readers therefore see a whole file or none. So is what to do when a disk,
server or object store refuses for a while: `Patience` says how long it is tried again.
"""

from __future__ import annotations

import errno
import os
import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pyarrow import NativeFile, fs

from memlib.errors import InputError
from memlib.s3 import SCHEME, is_final, open_s3

T = TypeVar("T")

_PARTIAL = ".partial-"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between two attempts; each pause is twice the one before
READINGS = 30  # of an object that is replaced while it is read
# Answers, not refusals.
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class StorageRefused(OSError):
    """The storage refused for as long as it was tried; the cause is its last answer."""


@dataclass(frozen=True)
class Patience:
    """For how many seconds a storage that refuses is tried again, and who is told in a line when it begins and ends."""

    seconds: float = 0.0
    told: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Storage:
    """A folder of a file system; `location` is what the user called it, `uri` how any process finds it.

    Every method below raises `StorageRefused` where the storage refused longer than `patience` lasts.
    """

    location: str
    filesystem: fs.FileSystem
    root: str
    uri: str
    patience: Patience = field(default=Patience(), compare=False)

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
        self._insist(lambda: self._write(target, data))

    def read(self, path: str) -> bytes:
        """Return the content of `path`; raises FileNotFoundError if there is none."""
        return self._insist(lambda: self._read(f"{self.root}/{path}"))

    def read_parts(self, path: str, parse: Callable[[NativeFile], T]) -> T:
        """Return what `parse` makes of the open file, of which only what it asks for is fetched; raises as `read`."""
        target = f"{self.root}/{path}"

        def opened() -> T:
            with self.filesystem.open_input_file(target) as source:
                try:
                    return parse(source)
                except OSError as error:
                    if self._size(target) is None:
                        raise FileNotFoundError(target) from error
                    raise

        return self._insist(opened)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in `folder`, unfinished ones left out; empty if there is no folder."""
        return sorted(self._files(folder))

    def names_by_folder(self, folder: str) -> dict[str, list[str]]:
        """Return the names of the files in each folder below `folder`, from one listing."""
        found: dict[str, list[str]] = {}
        for path in sorted(self._files(folder, recursive=True)):
            inner, _, name = path.rpartition("/")
            found.setdefault(inner, []).append(name)
        return found

    def modified(self, folder: str) -> dict[str, int]:
        """Return when each file in `folder` was last written, in nanoseconds, by name."""
        return {name: info.mtime_ns for name, info in self._files(folder).items()}

    def exists(self, path: str) -> bool:
        """Return whether there is a file at `path`."""
        info = self._insist(lambda: self.filesystem.get_file_info(f"{self.root}/{path}"))
        return info.type == fs.FileType.File

    def delete(self, path: str) -> None:
        """Remove the file at `path`; a file that is not there is fine."""
        try:
            self._insist(lambda: self.filesystem.delete_file(f"{self.root}/{path}"))
        except FileNotFoundError:
            return

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

    def _write(self, target: str, data: bytes | memoryview) -> None:
        if self.is_local:
            _write_local(Path(target), data)
            return
        with self.filesystem.open_output_stream(target) as sink:
            sink.write(data)

    def _read(self, target: str) -> bytes:
        if self.is_local:
            return Path(target).read_bytes()
        for _ in range(READINGS):
            # First the size is asked for, then that many bytes: an object that is replaced in between comes
            # truncated, and one that is removed as an error of some kind.
            with self.filesystem.open_input_file(target) as source:
                try:
                    data = source.read()
                except OSError:
                    if self._size(target) == source.size():
                        raise
                    continue
            if self._size(target) == len(data):
                return data
        raise OSError(f"{target} was replaced or removed while it was read, {READINGS} times")

    def _size(self, target: str) -> int | None:
        return self.filesystem.get_file_info(target).size

    def _files(self, folder: str, *, recursive: bool = False) -> Mapping[str, fs.FileInfo]:
        """Return the finished files in (or anywhere below) a folder, by their path in it."""
        base = f"{self.root}/{folder}".rstrip("/")
        selector = fs.FileSelector(base, allow_not_found=True, recursive=recursive)
        infos = self._insist(lambda: self.filesystem.get_file_info(selector))
        files = [i for i in infos if i.type == fs.FileType.File and not i.base_name.startswith(".")]
        return {i.path[len(base) + 1 :]: i for i in files}

    def _insist(self, action: Callable[[], T]) -> T:
        """Return what `action` does, tried again while the storage refuses and patience lasts."""
        started, pause, refused = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                done = action()
            except OSError as error:
                waited = time.monotonic() - started
                if isinstance(error, _ANSWERS) or is_final(error) or self.patience.seconds <= 0:
                    raise
                if waited + pause > self.patience.seconds:
                    raise StorageRefused(error.errno, f"{self.location} refused for {waited:.0f} s: {error}") from error
                if not refused:
                    self.patience.told(f"{self.location} refuses ({_first_line(error)}); it is tried again")
                refused = True
                # Many writers that were refused at once do not come back at once.
                time.sleep(pause * random.SystemRandom().uniform(0.75, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if refused:
                    self.patience.told(f"{self.location} answers again after {time.monotonic() - started:.0f} s")
                return done


def open_storage(location: str | Path, patience: Patience | None = None) -> Storage:
    """Return the storage at a local path or a URI such as `s3://bucket/prefix`; nothing is read or written yet.

    Raises:
        InputError: the location cannot be understood.
    """
    text, patience = str(location), patience or Patience()
    try:
        if "://" not in text:
            root = str(Path(text).expanduser().absolute())
            return Storage(text, fs.LocalFileSystem(), root, root, patience)
        if text.startswith(f"{SCHEME}://"):
            return Storage(text, *open_s3(text), patience)
        filesystem, root = fs.FileSystem.from_uri(text)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"location {text!r} is not understood: {error}. Give a folder or s3://BUCKET/FOLDER."
        ) from error
    # Whatever opens a local folder by its URI (TensorBoard's writer, Polars) takes its path.
    return Storage(text, filesystem, root, root if isinstance(filesystem, fs.LocalFileSystem) else text, patience)


def check_writable(storage: Storage) -> None:
    """Write and remove a small file; raises InputError if that fails."""
    probe = f".write_test_{uuid.uuid4().hex}"
    storage = replace(storage, patience=Patience())  # the user is waiting for the answer
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


def _first_line(error: OSError) -> str:
    return str(error).split("\n", 1)[0][:200]
