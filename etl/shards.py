"""Writes the shards of a dataset folder; syncs and describes its files beside the work on the next ones."""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from etl.artifact import Json, sha256
from etl.spec import Etl


class Shards:
    """`part-00000.parquet` and on in a new folder, each of at most `rows_per_shard` rows, in full row groups."""

    def __init__(self, folder: Path, etl: Etl, *, finished: "Finished") -> None:
        folder.mkdir()
        self.rows, self.folder = 0, folder
        self._etl, self._finished = etl, finished
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._left = 0

    def write(self, table: pa.Table) -> None:
        """Rows that follow those before."""
        while table.num_rows:
            if not self._left:
                self._next(table.schema)
            full = min(self._etl.rows_per_group, self._left)
            head = table.slice(0, full - sum(part.num_rows for part in self._waiting))
            table = table.slice(head.num_rows)
            self._waiting.append(head)
            self.rows += head.num_rows
            if sum(part.num_rows for part in self._waiting) == full:
                self._flush()

    def _flush(self) -> None:
        """Writes what waits as one row group."""
        if self._waiting:
            group, self._waiting = pa.concat_tables(self._waiting), []
            self._writer.write_table(group, row_group_size=group.num_rows)  # type: ignore[union-attr]
            self._left -= group.num_rows

    def _next(self, schema: pa.Schema) -> None:
        self.close()
        self._writer, self._left = _writer(self._path(self.rows), schema), self._etl.rows_per_shard

    def close(self) -> None:
        """Ends the last shard."""
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._finished.add(self._path(self.rows - 1))

    def _path(self, row: int) -> Path:
        """The shard that holds the row."""
        return self.folder / f"part-{row // self._etl.rows_per_shard:05d}.parquet"


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Ids in as few bits as each block of them needs: as small as compressed, and read in a third of the time."""
    columns = {f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name: f.type for f in schema}
    whole = {name: pa.types.is_int64(getattr(kind, "value_type", kind)) for name, kind in columns.items()}
    return pq.ParquetWriter(
        path,
        schema,
        compression={name: "none" if ids else "snappy" for name, ids in whole.items()},
        use_dictionary=False,
        write_statistics=False,
        column_encoding={name: "DELTA_BINARY_PACKED" for name, ids in whole.items() if ids},
    )


class Finished(contextlib.ExitStack):
    """Syncs files to disk and describes them, beside the work on the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self._pool = self.enter_context(ThreadPoolExecutor(1))
        self._described: dict[Path, Future[Json]] = {}

    def beside(self, job: Callable[[], Json]) -> Future[Json]:
        """Runs a job beside the work."""
        return self._pool.submit(job)

    def add(self, *paths: Path) -> None:
        """Files that no one will change."""
        self._described |= {path: self._pool.submit(_described, path) for path in paths}

    def files(self, folder: Path) -> dict[str, Json]:
        """Every file of the folder, described."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.add(*(path for path in paths if path not in self._described))
        return {path.relative_to(folder).as_posix(): self._described[path].result() for path in paths}


def _described(path: Path) -> Json:
    """Size and hash of a file that is on disk now, and rows where it is parquet."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    entry: Json = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entry | ({"rows": pq.ParquetFile(path).metadata.num_rows} if path.suffix == ".parquet" else {})
