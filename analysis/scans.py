"""A result table as one lazy scan over its files: only the columns and rows that are asked for are read."""

from __future__ import annotations

import io
import typing
from collections.abc import Sequence
from pathlib import PurePosixPath

import polars as pl

from memlib.results import ResultStore
from memlib.schemas import SCHEMAS

Source = str | io.BytesIO


def scan_table(store: ResultStore, table: str) -> pl.LazyFrame:
    """Return all rows of a table, none twice: each file's footer is read now, columns when rows are collected.

    Files on an object store are fetched whole, some at once: Polars itself opens local files only.

    Raises:
        InputError: a file is damaged or of another schema version; the message names it.
    """
    schema = typing.cast(pl.DataFrame, pl.from_arrow(SCHEMAS[table].empty_table())).schema
    own: list[Source] = []
    compact: list[pl.LazyFrame] = []
    seen: set[str] = set()
    for path, source in _sources(store, store.files(table)):
        units = _units_in(store, path, source)
        if units == {PurePosixPath(path).stem}:
            own.append(source)
        else:
            rows = _scan([source], schema)
            compact.append(rows.filter(~pl.col("unit_id").is_in(sorted(seen & units))) if seen & units else rows)
        seen |= units
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
