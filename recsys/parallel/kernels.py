"""Lookups and updates of fp32 rows in host memory on all cores, by the loops of `kernels.c`.

The installation compiles them where it finds a C compiler with OpenMP. Without them FBGEMM looks rows up, and it or
`recsys.optim` moves them, with results equal within rounding. FBGEMM's wheels for CPUs are built without OpenMP: they
use one core.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from recsys.optim import OptimizerSettings, adam_step

VERSION = 1  # of kernels.c
_KINDS = ("sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl")
_LIMIT = 1 << 32  # of rows, and of floats of a gradient: both share 64 bits in the sort


class _Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("features", "total")),
        *((name, ctypes.c_void_p) for name in ("begin", "count", "width", "column", "weights")),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("features", "width", "first_width", "rows", "column")),
        *((name, ctypes.c_void_p) for name in ("base", "weights", "first", "second", "l2")),
    ]


class Rule(ctypes.Structure):
    """What moves some columns of a row."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "start", "stop", "nesterov")),
        *((name, ctypes.c_double) for name in ("rate", "momentum", "beta1", "beta2", "eps")),
        *((name, ctypes.c_double) for name in ("l1", "l2", "l2_shrinkage", "beta", "power")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, where the installation has them and they load.

    Raises:
        RuntimeError: they are not those of this version.
    """
    found = find_spec("recsys.parallel._kernels")
    if found is None or found.origin is None:
        return None
    try:
        loops = ctypes.CDLL(found.origin)
    except OSError:  # made on another machine: for a newer C library, or an OpenMP that is not here
        return None
    loops.version.restype = loops.look_up.restype = ctypes.c_int64
    if loops.version() != VERSION:
        raise RuntimeError(f"{found.origin} was compiled for another version: install the project again")
    return loops


def fits(tables: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether the loops are there and know such tables."""
    plain = all(location == EmbeddingLocation.HOST for _, _, location, _ in tables.embedding_specs)
    small = sum(spec[0] for spec in tables.embedding_specs) < _LIMIT
    return library() is not None and plain and small and tables.weights_host.dtype == torch.float32


class Lookup:
    """The forward pass of an FBGEMM module whose tables `fits`, with sums of rows and no weights of ids."""

    def __init__(self, tables: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        specs, of_feature = tables.embedding_specs, list(tables.feature_table_map)
        columns = torch.as_tensor(tables.D_offsets).tolist()
        self._weights = tables.weights_host
        begins = [int(tables.weights_physical_offsets[at]) for at in of_feature]
        rows, widths = ([specs[at][which] for at in of_feature] for which in (0, 1))
        self._features = torch.tensor([begins, rows, widths, columns[:-1]])
        pointers = [row.data_ptr() for row in self._features]
        self._tables = _Tables(len(of_feature), columns[-1], *pointers, self._weights.data_ptr())
        self._total = columns[-1]

    def __call__(self, indices: Tensor, offsets: Tensor, *, per_sample_weights: Tensor | None = None) -> Tensor:
        """Sums [B, D] of the rows of F bags for each row of the batch, from ids [I] and their offsets [F * B + 1].

        Raises:
            IndexError: an id that its table has not.
            ValueError: weights of ids.
        """
        if per_sample_weights is not None:
            raise ValueError("a lookup with per_sample_weights, wanted ids and offsets alone")
        ids, bounds = indices.long().contiguous(), offsets.long().contiguous()
        size = (len(bounds) - 1) // self._features.shape[1]
        rows_BD = torch.empty(size, self._total)
        bad = _library().look_up(
            ctypes.byref(self._tables), *_pointers(ids, bounds), ctypes.c_int64(size), *_pointers(rows_BD)
        )
        if bad >= 0:
            feature = int((bounds <= bad).sum() - 1) // size
            raise IndexError(
                f"id {int(ids[bad])} of feature {feature}: its table has {self._features[1, feature]} rows"
            )
        return rows_BD


class Mover:
    """Moves touched rows of neighbouring tables of one width, as `recsys.optim.update` does."""

    def __init__(
        self, weights_RW: Tensor, states: Sequence[Tensor], *, base_F: Tensor, column: int, l2_W: Tensor | None
    ) -> None:
        """`states` are [R, W], the first perhaps [R, 1]; `base_F` says at which row of the matrix each feature's table
        begins, `column` where the gradients of the first feature begin."""
        self._kept = (weights_RW, *states, base_F, l2_W)  # the loops know addresses alone
        rows, width = weights_RW.shape
        first, second = (*states, None, None)[:2]
        at = [None if value is None else value.data_ptr() for value in (base_F, weights_RW, first, second, l2_W)]
        self._group = _Group(len(base_F), width, 0 if first is None else first.shape[1], rows, column, *at)

    def move(self, indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor, rules: Sequence[Rule]) -> None:
        """One step by the gradient of what was looked up; `offsets` [F * B + 1] begin with the first feature's."""
        gradient_BD = gradient_BD.float().contiguous()
        if gradient_BD.numel() >= _LIMIT:
            raise ValueError(f"a gradient of {list(gradient_BD.shape)}, wanted less than {_LIMIT} floats")
        ids, bounds = indices.long().contiguous(), offsets.long().contiguous()
        size, stride = gradient_BD.shape
        scratch = torch.empty(2 * len(ids), dtype=torch.int64)
        made = (Rule * len(rules))(*rules)
        _library().move(
            ctypes.byref(self._group), made, ctypes.c_int64(len(rules)), *_pointers(ids, bounds), ctypes.c_int64(size),
            *_pointers(gradient_BD), ctypes.c_int64(stride), *_pointers(scratch),
        )  # fmt: skip


def rule(settings: OptimizerSettings, *, start: int, stop: int, step: int) -> Rule:
    """What moves the columns from `start` to `stop` in a step that counts from 1."""
    rate, eps = adam_step(settings, step) if settings.optimizer == "adam" else (settings.learning_rate, settings.eps)
    return Rule(
        _KINDS.index(settings.optimizer), start, stop, settings.nesterov, rate, settings.momentum, settings.beta1,
        settings.beta2, eps, settings.l1, settings.ftrl_l2, settings.l2_shrinkage, settings.ftrl_beta,
        -settings.ftrl_power,
    )  # fmt: skip


def _library() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("the installation has no compiled loops")
    return found


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
