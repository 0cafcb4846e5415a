"""Results name the code that made them, wherever it lies."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import memlib

SOURCE = Path(memlib.__file__).parent
IDENTITY = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def asked(folder):
    """What a process says that runs the copy of memlib in a folder."""
    command = [sys.executable, "-c", "from memlib.code_version import code_version; print(code_version())"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def git(folder, *arguments):
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **IDENTITY}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_checkout_is_named_by_its_commit_and_a_copy_by_its_source(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "memlib", ignore=shutil.ignore_patterns("__pycache__"))
    copy = asked(tmp_path)
    assert re.fullmatch(rf"{re.escape(version('memlib'))}\+source\.[0-9a-f]{{12}}", copy)

    git(tmp_path, "init", "--quiet")
    (tmp_path / "other").write_text("of whoever installed memlib here")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "--quiet", "-m", "no memlib in it")
    assert asked(tmp_path) == copy

    git(tmp_path, "add", "memlib")
    git(tmp_path, "commit", "--quiet", "-m", "memlib")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert asked(tmp_path) == f"{version('memlib')}+{commit}"
    with (tmp_path / "memlib" / "units.py").open("a") as module:
        module.write("# changed\n")
    assert asked(tmp_path) == f"{version('memlib')}+{commit}-dirty"

    shutil.rmtree(tmp_path / ".git")
    assert asked(tmp_path) not in (copy, f"{version('memlib')}+{commit}")


def test_the_package_is_found_where_a_process_starts_beside_its_checkout(tmp_path):
    """A job's processes on a cluster start in the folder that holds the checkout, a folder called memlib."""
    (tmp_path / "memlib").symlink_to(SOURCE.parent)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import memlib, sweeps.equipment; print(memlib.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == SOURCE / "__init__.py"
