"""A result table as one lazy scan over its files: only the columns and rows that are asked for are read."""

from __future__ import annotations

import io
import typing
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

import polars as pl

from memlib.results import ResultStore
from memlib.schemas import SCHEMAS

Source = str | io.BytesIO


def scan_table(store: ResultStore, table: str, *, units: Collection[str] | None = None) -> pl.LazyFrame:
    """Return all rows of a table, none twice: each file's footer is read now, columns when rows are collected.

    units: only the rows of these units of work; the files of others are not opened.
    Files on an object store are fetched whole, some at once: Polars itself opens local files only.

    Raises:
        InputError: a file is damaged or of another schema version; the message names it.
    """
    schema = typing.cast(pl.DataFrame, pl.from_arrow(SCHEMAS[table].empty_table())).schema
    own: list[Source] = []
    compact: list[pl.LazyFrame] = []
    seen: set[str] = set()
    paths = store.files(table)
    if units is not None:
        others = store.units(table) - set(units)
        paths = [path for path in paths if PurePosixPath(path).stem not in others]
    for path, source in _sources(store, paths):
        found = _units_in(store, path, source)
        if found == {PurePosixPath(path).stem}:
            own.append(source)
        else:
            unwanted = seen & found if units is None else (seen & found) | (found - set(units))
            rows = _scan([source], schema)
            compact.append(rows.filter(~pl.col("unit_id").is_in(sorted(unwanted))) if unwanted else rows)
        seen |= found
    parts = [*([_scan(own, schema)] if own else []), *compact]
    return pl.concat(parts) if parts else pl.DataFrame(schema=schema).lazy()


def _sources(store: ResultStore, paths: Sequence[str]) -> list[tuple[str, Source]]:
    if store.storage.is_local:
        return [(path, f"{store.storage.root}/{path}") for path in paths]
    return [(path, io.BytesIO(content)) for path, content in zip(paths, store.contents(paths), strict=True)]


def _units_in(store: ResultStore, path: str, source: Source) -> set[str]:
    try:
        metadata = pl.read_parquet_metadata(source)
    except pl.exceptions.PolarsError as error:
        raise store.damaged(path, error) from error
    return store.units_in(path, {key.encode(): value.encode() for key, value in metadata.items()})


def _scan(sources: list[Source], schema: pl.Schema) -> pl.LazyFrame:
    return pl.scan_parquet(typing.cast(list[str], sources), schema=schema, extra_columns="ignore", glob=False)
