"""Which code made a result: the package's version, with the commit it is at or, without git, a digest of its source."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FOLDER = Path(__file__).parent


@functools.cache
def code_version() -> str:
    """Return e.g. `0.1.0+d4f31c7abcde`, with `-dirty` where the checkout was changed since that commit; asked once.

    Outside a git checkout of its own (installed, or copied to a node of a cluster) it is `0.1.0+source.` and the digest
    of the package's source. `uninstalled` stands for the version where the sources were not installed.
    """
    try:
        installed = version("memlib")
    except PackageNotFoundError:
        installed = "uninstalled"
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a checkout around an installed copy is not ours
        return f"{installed}+{_git('describe', '--always', '--dirty', '--abbrev=12')}"
    except (OSError, subprocess.SubprocessError):
        return f"{installed}+source.{source_digest([_FOLDER])}"


def source_digest(folders: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits of the Python sources below the folders."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_FOLDER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
