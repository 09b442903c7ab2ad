"""The TPC-H tables: real Parquet files, made once and kept.

Covers: where the files lie, how they are made (``tpchgen-cli``, from PyPI) and how they are opened.
Does not cover: the queries; see :mod:`dask_gpurt.demo.tpch`.

Decimals become floats as the tables are made. pandas has no decimals: it would make a Python object of every price each time
the files are read, and a float of every object, which takes several times what a query does.

A scale factor's tables are made in a folder beside the final one, which is renamed when it is complete: a folder that
bears the final name is whole, and of two processes that make the same one, the second finds the work done.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

from dask_gpurt.errors import GpurtError

__all__ = ["SMALL_TABLES", "TABLES", "DataError", "default_cache", "ensure_tables"]

#: Tables whose size follows the scale factor.
LARGE_TABLES = ("customer", "lineitem", "orders", "part", "partsupp", "supplier")
#: Tables of 5 and 25 rows.
SMALL_TABLES = ("nation", "region")
TABLES = (*LARGE_TABLES, *SMALL_TABLES)

#: Files per table and scale factor. A file of lineitem has 750,000 rows then, about 100 MB in memory: the size of
#: partition that Dask's documentation recommends.
FILES_PER_SCALE = 8

#: Goes into the folder's name: another layout of the files is another folder.
LAYOUT = 2


class DataError(GpurtError, RuntimeError):
    """The tables cannot be made."""


def default_cache() -> Path:
    """Return the folder for what can be made again: ``$XDG_CACHE_HOME/dask-gpurt``, or ``~/.cache/dask-gpurt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dask-gpurt"


def ensure_tables(scale: float, cache: Path) -> Path:
    """Return the folder that holds the tables of a scale factor, one folder of Parquet files a table.

    Raises
    ------
    DataError
        If the generator is not there or fails, or the folder can't be written.
    """
    target = cache / f"tpch-{scale:g}-v{LAYOUT}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    except OSError as error:
        raise DataError(f"The cache folder {cache} can't be written: {error.strerror}") from error
    try:
        parts = max(2, math.ceil(FILES_PER_SCALE * scale))
        _generate(scale, parts, LARGE_TABLES, unfinished)
        _generate(scale, 1, SMALL_TABLES, unfinished)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            for _ in threads.map(_decimals_to_floats, unfinished.glob("*/*.parquet")):
                pass
        try:
            unfinished.rename(target)
        except OSError:
            # Another process was faster: a folder that is not empty is never replaced.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _generate(scale: float, parts: int, tables: tuple[str, ...], folder: Path) -> None:
    # The console script stands beside the interpreter, which need not be on the PATH.
    program = shutil.which("tpchgen-cli", path=os.path.dirname(sys.executable)) or shutil.which("tpchgen-cli")
    if program is None:
        raise DataError("tpchgen-cli is not there; pip install 'dask-gpurt[demo]' brings it")
    command = [program, "parquet", f"--scale-factor={scale:g}", f"--output-dir={folder}", f"--parts={parts}"]
    command += [f"--tables={','.join(tables)}", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise DataError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}")


def _decimals_to_floats(path: Path) -> None:
    """Rewrite a file that has decimals, with the same row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rewritten = path.with_suffix(".floats")
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        decimals = [index for index, field in enumerate(schema) if pa.types.is_decimal(field.type)]
        if not decimals:
            return
        for index in decimals:
            schema = schema.set(index, schema.field(index).with_type(pa.float64()))
        with pq.ParquetWriter(rewritten, schema) as writer:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                for index in decimals:
                    group = group.set_column(index, schema.field(index), _floats(group.column(index)))
                writer.write_table(group)
    rewritten.rename(path)


def _floats(decimals: Any) -> Any:
    """Return the nearest floats; Arrow's own cast multiplies by 0.01, and may be off by a last bit."""
    import pyarrow as pa
    import pyarrow.compute as pc

    unit = 10**decimals.type.scale
    return pc.divide(pc.multiply(decimals, pa.scalar(Decimal(unit))).cast(pa.int64()).cast(pa.float64()), float(unit))
