"""A Parquet store of the result tables in which a unit of work is done or not.

One file a unit and table, `<results>/<table>/<unit_id>.parquet`, written whole or not at all.
`compact` merges them into `<table>/compact-NNNNNN-XXXXXXXX.parquet`. Where one unit has rows in several files
(a run repeated after `compact`), its own file wins, then the newest compact file, so no row is ever read twice.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memlib.errors import InputError
from memlib.schemas import SCHEMA_VERSION, SCHEMAS, VERSION_KEY, schema_of
from memlib.storage import Patience, Storage, check_writable, open_storage

T = TypeVar("T")

READERS = 16  # files read at once: an object store answers each after tens of milliseconds
_UNITS_KEY = b"memlib_units"
_MARKER = "memlib-results.json"
_COMPACT = "compact-"
_ROW_GROUP = 2**17  # rows; readers skip the groups whose runs they do not want
_DELETED_AT_ONCE = 1000  # files between two looks at what was written anew
_LISTINGS = 5  # tried before a file that is gone is an error
_MANY_ROWS = 50_000  # from here on the columns of a file are read by several threads


@dataclass(frozen=True)
class ResultStore:
    """The tables of one results folder."""

    storage: Storage

    def write(self, table: str, unit_id: str, rows: pa.Table) -> None:
        """Write one unit's rows of one table, replacing what the unit wrote before.

        `rows` has the table's columns except `unit_id`, in any order.

        Raises:
            InputError: the columns are not the declared ones.
            OSError: the storage refuses; what was there stays readable.
        """
        schema = schema_of(table)
        rows = rows.append_column("unit_id", pa.array([unit_id] * rows.num_rows, pa.string()))
        if set(rows.column_names) != set(schema.names):
            odd = sorted(set(rows.column_names) ^ set(schema.names))
            raise InputError(f"table {table!r}: columns {odd} are missing or not declared.")
        self.storage.write(f"{table}/{unit_id}.parquet", _to_parquet(rows.select(schema.names).cast(schema)))

    def read(self, table: str, *, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of a table with its declared schema; no rows if nothing was written yet.

        `columns` reads only those, which saves time and memory on large tables.

        Raises:
            InputError: a file is damaged or of another schema version; the message names it.
        """
        schema = schema_of(table)
        wanted = list(columns or schema.names)
        empty = schema.empty_table().select(wanted)
        return _relisting(lambda: pa.concat_tables([empty, *(rows for rows, _ in self._pieces(table, wanted))]))

    def files(self, table: str) -> list[str]:
        """Return the paths of a table's files in its storage: where a unit is in several, the first of them holds."""
        schema_of(table)
        return [f"{table}/{name}" for name in self._newest_first(table)]

    def contents(self, paths: Sequence[str]) -> Iterator[bytes]:
        """Yield the content of each file; many are under way at once, as each waits its turn."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(self.storage.read, paths)

    def units_in(self, path: str, metadata: Mapping[bytes, bytes] | None) -> set[str]:
        """Return the units that have rows in the file at `path`, given its Parquet metadata.

        Raises:
            InputError: it is of another schema version.
        """
        metadata = metadata or {}
        _check_version(self._where(path), metadata.get(VERSION_KEY, b"none").decode())
        own = path.rsplit("/", 1)[-1].removesuffix(".parquet")
        return set(json.loads(metadata[_UNITS_KEY])) if _UNITS_KEY in metadata else {own}

    def damaged(self, path: str, error: Exception) -> InputError:
        """Return the error that names the file at `path`, which cannot be read, and says what to do."""
        is_merged = path.rsplit("/", 1)[-1].startswith(_COMPACT)
        again = " (all that was merged into it is computed again)" if is_merged else ""
        return InputError(
            f"result file {self._where(path)} is damaged ({error}); delete it and run the sweep again{again}."
        )

    def units(self, table: str) -> set[str]:
        """Return the ids of the units that have written to `table`; raises like `read`."""
        return _relisting(lambda: set().union(*(self._units_of(table, name) for name in self._newest_first(table))))

    def finished_runs(self) -> set[str]:
        """Return the ids of the runs whose row says `done` (failed ones are wanted again); raises like `read`."""
        runs = self.read("runs", columns=["run_id", "status"])
        return set(runs.filter(pc.field("status") == "done")["run_id"].to_pylist())

    def rows_of(self, table: str, unit_id: str) -> list[dict[str, Any]]:
        """Return the rows in the unit's own file, the only one looked at; none where it was merged into another."""
        path = f"{table}/{unit_id}.parquet"
        try:
            return self._open(path, self.storage.read(path)).read().to_pylist()
        except FileNotFoundError:
            return []

    def compact(self) -> dict[str, int]:
        """Merge each table's files into one and return the number of files each table had.

        Safe to interrupt, and beside a running sweep: the merged file is complete before the first old
        one is removed, and a file written meanwhile stays and wins.

        Raises:
            InputError: a file is damaged or of another schema version, or another process compacts the same table;
                nothing is lost then.
        """
        return {table: self._compact_table(table) for table in SCHEMAS}

    def _compact_table(self, table: str) -> int:
        names = self._newest_first(table)
        if len(names) < 2:
            return len(names)
        written = self.storage.modified(table)
        pieces = _relisting(lambda: list(self._pieces(table, schema_of(table).names)))
        merged = _to_parquet(pa.concat_tables([rows for rows, _ in pieces]), units=set().union(*(u for _, u in pieces)))
        last = max((int(n[len(_COMPACT) :][:6]) for n in names if n.startswith(_COMPACT)), default=0)
        own = f"{_COMPACT}{last + 1:06d}-{uuid.uuid4().hex[:8]}.parquet"
        self.storage.write(f"{table}/{own}", merged)
        if any(name.startswith(_COMPACT) for name in set(self.storage.names(table)) - {own, *names}):
            self.storage.delete(f"{table}/{own}")  # which of two would be the newer one cannot be told
            raise InputError(f"{self._where(table)} is being compacted by another process; run this when it has ended.")
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(names), _DELETED_AT_ONCE):
                now = self.storage.modified(table)
                batch = [name for name in names[start : start + _DELETED_AT_ONCE] if name in now]
                unchanged = [f"{table}/{name}" for name in batch if now[name] == written.get(name)]
                list(pool.map(self.storage.delete, unchanged))
        return len(names)

    def _newest_first(self, table: str) -> list[str]:
        names = [n for n in self.storage.names(table) if n.endswith(".parquet")]
        own = [n for n in names if not n.startswith(_COMPACT)]
        return own + sorted((n for n in names if n.startswith(_COMPACT)), reverse=True)

    def _units_of(self, table: str, name: str) -> set[str]:
        if not name.startswith(_COMPACT):
            return {name.removesuffix(".parquet")}
        path = f"{table}/{name}"
        try:
            schema = self.storage.read_parts(path, pq.read_schema)
        except pa.ArrowInvalid as error:
            raise self.damaged(path, error) from error
        return self.units_in(path, schema.metadata)

    def _pieces(self, table: str, columns: list[str]) -> Iterator[tuple[pa.Table, set[str]]]:
        """Yield each file's rows, without those that an earlier file holds anew, and the units it holds."""
        with_unit, seen = [*dict.fromkeys(["unit_id", *columns])], set()
        with ThreadPoolExecutor(READERS) as pool:
            for rows, units in pool.map(lambda path: self._read_file(table, path, with_unit), self.files(table)):
                if seen & units:
                    rows = rows.filter(~pc.field("unit_id").isin(sorted(seen & units)))
                seen |= units
                yield rows.select(columns), units

    def _read_file(self, table: str, path: str, columns: list[str]) -> tuple[pa.Table, set[str]]:
        file = self._open(path, self.storage.read(path))
        units = self.units_in(path, file.schema_arrow.metadata)
        schema = pa.schema([schema_of(table).field(column) for column in columns], schema_of(table).metadata)
        try:
            rows = file.read(columns=columns, use_threads=file.metadata.num_rows > _MANY_ROWS)
            return rows if rows.schema.equals(schema, check_metadata=True) else rows.cast(schema), units
        except OSError as error:
            raise self.damaged(path, error) from error
        except (pa.ArrowInvalid, ValueError) as error:
            raise InputError(
                f"result file {self._where(path)} does not have the columns of table {table!r}: {error}."
            ) from error

    def _open(self, path: str, content: bytes) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(pa.BufferReader(content))
        except pa.ArrowInvalid as error:
            raise self.damaged(path, error) from error

    def _where(self, path: str) -> str:
        return f"{self.storage.location}/{path}"


def create_results(location: str | Path) -> ResultStore:
    """Return the store at a local folder or URI for reading and writing, made if missing.

    Raises:
        InputError: it cannot be written, or another schema version wrote it.
    """
    storage = open_storage(location)
    check_writable(storage)
    if not _is_marked(storage):
        storage.write(_MARKER, json.dumps({"schema_version": SCHEMA_VERSION}).encode())
    return ResultStore(storage)


def open_results(location: str | Path, patience: Patience | None = None) -> ResultStore:
    """Return the store at a local folder or URI for reading.

    `patience`: how long it is tried again when it refuses; default: not at all.

    Raises:
        InputError: there are no results, or another schema version wrote them.
    """
    storage = open_storage(location, patience)
    if not _is_marked(storage):
        raise InputError(
            f"there are no results at {location}; run python sweeps/full_paper.py --results {location} first."
        )
    return ResultStore(storage)


def _relisting(read: Callable[[], T]) -> T:
    """Return what `read` reads of the files it lists; a compaction may remove some before they are read."""
    for _ in range(_LISTINGS - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def _is_marked(storage: Storage) -> bool:
    """Return whether a results folder begins here; raises InputError if another schema version wrote it."""
    try:
        marker = storage.read(_MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return False
    _check_version(storage.location, str(json.loads(marker).get("schema_version")))
    return True


def _check_version(where: str, version: str) -> None:
    if version != str(SCHEMA_VERSION):
        raise InputError(
            f"results at {where} were written by schema version {version}, this memlib reads {SCHEMA_VERSION}; "
            "give another --results folder, or use the memlib that wrote them."
        )


def _to_parquet(rows: pa.Table, units: set[str] | None = None) -> memoryview:
    """Return the Parquet file of `rows`, read back once: what is stored can be read."""
    if units is not None:
        rows = rows.replace_schema_metadata({**(rows.schema.metadata or {}), _UNITS_KEY: json.dumps(sorted(units))})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", row_group_size=_ROW_GROUP)
    buffer = sink.getvalue()
    if pq.read_metadata(pa.BufferReader(buffer)).num_rows != rows.num_rows:
        raise OSError("a Parquet file lost rows while it was written; nothing was stored.")
    return memoryview(buffer)
