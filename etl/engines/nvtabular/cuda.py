"""What NVTabular 23.8 looks for in cuDF 24.12 and does not find under that name. Never run on a GPU."""

import importlib
import importlib.util


def mend_cudf() -> None:
    """Puts back the two names; without cuDF does nothing.

    Merlin imports `build_categorical_column`, for columns of a Hive partition, which the engine has none of; and calls
    `dask_cudf.from_dask_dataframe`, which became a method.
    """
    if importlib.util.find_spec("cudf") is None:
        return
    column = importlib.import_module("cudf.core.column")
    if not hasattr(column, "build_categorical_column"):
        column.build_categorical_column = _no_hive_partitions  # type: ignore[attr-defined]
    dask_cudf = importlib.import_module("dask_cudf")
    if not hasattr(dask_cudf, "from_dask_dataframe"):
        dask_cudf.from_dask_dataframe = _to_cudf  # type: ignore[attr-defined]


def _no_hive_partitions(*_: object) -> object:
    raise TypeError("a Hive-partitioned dataset is not read on a GPU")


def _to_cudf(frame: object) -> object:
    return frame.to_backend("cudf")  # type: ignore[attr-defined]
