"""All of NVTabular, Merlin and Dask that the engine uses. Nothing else imports them.

- Merlin needs Dask's first dataframe API and texts as Python objects, so both settings come before the import.
- Merlin loads torch and tensorflow where it finds them, for tensors that the engine has no use for: both are hidden.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator

from etl.faults import Fault


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings about CPU mode, chained assignment and deprecated APIs, of which the user can mend none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _hidden(*modules: str) -> Iterator[None]:
    """Whoever imports one of these gets an ImportError; a module that is loaded already stays."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


try:
    with quiet(), _hidden("torch", "tensorflow"):
        import dask as dask

        dask.config.set({"dataframe.query-planning": False, "dataframe.convert-string": False})
        from etl.engines.nvtabular.cuda import mend_cudf

        mend_cudf()
        import dask.dataframe as ddf
        from dask import delayed as delayed
        from dask.dataframe.core import DataFrame as FirstDataFrame
        from dask.delayed import Delayed as Delayed
        from distributed import Client as Client
        from distributed import WorkerPlugin as WorkerPlugin
        from merlin.core.compat import HAS_GPU as HAS_GPU
        from merlin.core.dispatch import encode_list_column as encode_list_column
        from merlin.core.dispatch import flatten_list_column_values as flatten_list_column_values
        from merlin.core.utils import set_dask_client as set_dask_client
        from nvtabular import ColumnSelector as ColumnSelector
        from nvtabular import Dataset as Dataset
        from nvtabular import Workflow as Workflow
        from nvtabular.ops import Bucketize as Bucketize
        from nvtabular.ops import Categorify as Categorify
        from nvtabular.ops import Clip as Clip
        from nvtabular.ops import FillMissing as FillMissing
        from nvtabular.ops import LogOp as LogOp
        from nvtabular.ops import Normalize as Normalize
        from nvtabular.ops import Operator as Operator
        from nvtabular.ops.stat_operator import StatOperator as StatOperator
except ImportError as error:
    raise Fault(
        "etl.engine",
        got=f"no NVTabular in this environment ({error})",
        wanted="the extra 'nvtabular'",
        remedy='with Python 3.11 run `make setup`, which installs it, or set engine = "polars"',
    ) from None

if ddf.DataFrame is not FirstDataFrame:
    raise Fault(
        "etl.engine",
        got="Dask's new dataframes, which this process has loaded before",
        wanted="its first ones, which NVTabular needs",
        remedy="run the ETL in a process of its own, or import etl.engines.nvtabular.library first",
    )
