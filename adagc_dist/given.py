"""Single labels that somebody has chosen (``spml.policy=file``, the paper's Manual setting): patch and label."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from adagc_dist.spml import refuse_rows
from sharding.manifest import LabelTable

__all__ = ["GivenLabels", "read_given"]

_KEYS = ("patch_id", "key")


@dataclass(frozen=True, eq=False)
class GivenLabels:
    """One label a patch (M patches).

    Attributes:
        name: the file's, for messages.
        keys: M patch ids, each once.
        columns_M: int64, the class of each.
        digest: of the file; a run goes on with the same.
    """

    name: str
    keys: pa.Array
    columns_M: NDArray[np.int64]
    digest: str

    def observe(self, table: LabelTable) -> NDArray[np.bool_]:
        """bool [N, C]: the given label of each row.

        Raises:
            ValueError: rows without one, or with one that is not among their full labels.
        """
        found = pc.index_in(table.keys, value_set=self.keys)
        missing_N = found.is_null().to_numpy(zero_copy_only=False)
        where = f"spml.file={self.name}"
        refuse_rows(table, missing_N, f"are not in {where}: it must name every patch of train and validation")
        rows_N, columns_N = np.arange(len(table)), self.columns_M[found.to_numpy()]
        wrong_N = ~table.labels_NC[rows_N, columns_N]
        refuse_rows(table, wrong_N, f"have another label in {where} than any of their full ones in the shards")
        observed_NC = np.zeros_like(table.labels_NC)
        observed_NC[rows_N, columns_N] = True
        return observed_NC


def read_given(path: Path, classes: Sequence[str]) -> GivenLabels:
    """CSV, TSV or parquet with the columns ``patch_id`` (or ``key``) and ``label``, the name of a class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: other columns, an unknown class, or a patch that is listed twice.
    """
    where = f"spml.file={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no such file")
    content = path.read_bytes()
    try:
        read = _parquet if content.startswith(b"PAR1") else _text
        table = read(content)
    except pa.ArrowException as error:
        raise ValueError(f"{where} is neither CSV, TSV nor parquet: {error}") from error
    key = next((name for name in _KEYS if name in table.column_names), None)
    if key is None or "label" not in table.column_names:
        raise ValueError(
            f"{where} must have the columns patch_id (or key) and label; it has {', '.join(table.column_names)}"
        )
    keys, labels = (table[name].cast(pa.string()).combine_chunks() for name in (key, "label"))
    columns = pc.index_in(labels, value_set=pa.array(classes))
    if columns.null_count:
        unknown = labels.filter(columns.is_null())[0].as_py()
        raise ValueError(f"{where}: {unknown!r} is no class of the shards, which are {', '.join(classes)}")
    if len(pc.unique(keys)) < len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise ValueError(f"{where}: {twice} is listed more than once, and a patch has one label")
    return GivenLabels(str(path), keys, columns.to_numpy().astype(np.int64), xxhash.xxh3_128_hexdigest(content))


def _parquet(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content))


def _text(content: bytes) -> pa.Table:
    first = content.partition(b"\n")[0]
    options = pyarrow.csv.ParseOptions(delimiter="\t" if b"\t" in first else ",")
    strings = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in (*_KEYS, "label")})
    return pyarrow.csv.read_csv(pa.BufferReader(content), parse_options=options, convert_options=strings)
