"""The tables of a served network: merged into matrices, read for rows, or for users and their candidates apart."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from recsys.layout import Layout, Part, Run
from recsys.models.head import Inputs

Tables = Literal["fp32", "fp16", "int8"]


class Matrix(nn.Module):
    """Several tables as one matrix [R, W]: one memory access for all slots instead of one for each.

    `starts` says where each table begins. An id out of its table's range would read a neighbour's row, so whoever calls
    checks the ids before.

    int8 rows are bytes with a scale and a start of their own, [R, K + 8]; the first-order weight, which would widen the
    range of the vector beside it, stays float32, as do rows of a weight alone (`vector` is 0).
    """

    matrix_RW: Tensor
    weights_RC: Tensor | None

    def __init__(self, tables: Mapping[str, Tensor], *, vector: int = 0, precision: Tables = "fp32") -> None:
        super().__init__()
        self.vector, self.starts, rows = vector, dict[str, int](), 0
        for name, table_RW in tables.items():
            self.starts[name] = rows
            rows += len(table_RW)
        matrix_RW, weights_RC = torch.cat(list(tables.values())), None
        if precision == "fp16":
            matrix_RW = matrix_RW.half()
        elif precision == "int8" and vector:
            weights_RC = matrix_RW[:, vector:].contiguous() if matrix_RW.shape[1] > vector else None
            matrix_RW = torch.ops.quantized.embedding_bag_byte_prepack(matrix_RW[:, :vector].contiguous())
        self.register_buffer("matrix_RW", matrix_RW)
        self.register_buffer("weights_RC", weights_RC)

    def forward(self, rows_V: Tensor) -> Tensor:
        """[V] -> [V, W], float32."""
        if self.matrix_RW.dtype != torch.uint8:
            return _rows(self.matrix_RW, rows_V).float()
        bags_V = torch.arange(rows_V.shape[0])
        got_VW: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(self.matrix_RW, rows_V, bags_V)
        return got_VW if self.weights_RC is None else torch.cat([got_VW, _rows(self.weights_RC, rows_V)], dim=1)


def _rows(matrix_RW: Tensor, rows_V: Tensor) -> Tensor:
    """Rows of a matrix as bags of one: a kernel that reads ahead, and that compilers do not repeat for each reader."""
    return nn.functional.embedding_bag(rows_V, matrix_RW, torch.arange(rows_V.shape[0]), mode="sum")


class Matrices(NamedTuple):
    """The rows with a vector, and first-order weights alone; None where there are none."""

    rows: Matrix | None
    weights: Matrix | None


class Columns(NamedTuple):
    """Where some features stand in the schema's order: columns of `ids_BS` and of `floats_BN`, ascending."""

    ids: Sequence[int]
    floats: Sequence[int]


class Split(NamedTuple):
    """The columns that are the user's, and the others."""

    user: Columns
    candidates: Columns


class User(NamedTuple):
    """The users of N candidates: ids [U, S], floats [U, N] of the user's columns, and each candidate's user [N]."""

    ids_US: Tensor
    floats_UN: Tensor
    of_row_B: Tensor


class Piece(NamedTuple):
    """A run of slots that all are the user's or none is; its `ids` and `floats` are counted in columns of its side."""

    run: Run
    pooled: bool
    of_user: bool

    @property
    def slots(self) -> range:
        """In the layout."""
        return range(self.run.start, self.run.stop)

    @property
    def single(self) -> bool:
        """One id a field, that is always there or reads as row 0."""
        return self.run.plain or len(self.slots) == 1


class Lookup(nn.Module):
    """What pieces give to a head, read from one matrix. Single ids are read slot by slot, lists without empty slots.

    `columns` are those of a side's ids in the schema's order.
    """

    single_L: Tensor
    single_begin_L: Tensor
    list_J: Tensor
    list_begin_J: Tensor
    first_F: Tensor

    def __init__(self, pieces: Sequence[Piece], *, layout: Layout, matrix: Matrix, columns: Sequence[int]) -> None:
        super().__init__()
        self.matrix, self.pieces = matrix, pieces
        self.lists = [piece for piece in pieces if not piece.single]
        for single, (at_name, begin_name) in (
            (True, ("single_L", "single_begin_L")),
            (False, ("list_J", "list_begin_J")),
        ):
            slots = [at for piece in pieces if piece.single == single for at in piece.slots]
            places = [columns.index(layout.columns[at]) for at in slots]
            begins = [matrix.starts[layout.slots[at][1]] for at in slots]
            self.register_buffer(at_name, torch.tensor(places, dtype=torch.int64))
            self.register_buffer(begin_name, torch.tensor(begins, dtype=torch.int64))
        lengths_F = torch.tensor([len(piece.slots) for piece in self.lists], dtype=torch.int64)
        self.register_buffer("first_F", lengths_F.cumsum(0) - lengths_F)

    def forward(self, ids_BS: Tensor, floats_BN: Tensor) -> list[Part]:
        """A part for each piece."""
        lists = self._lists(ids_BS, floats_BN) if self.lists else []
        singles = self._singles(ids_BS, floats_BN) if len(lists) < len(self.pieces) else []
        sources = {True: iter(singles), False: iter(lists)}
        return [next(sources[piece.single]) for piece in self.pieces]

    def _singles(self, ids_BS: Tensor, floats_BN: Tensor) -> list[Part]:
        rows_BL = ids_BS.index_select(1, self.single_L).clamp(min=0) + self.single_begin_L
        rows_BLW = self.matrix(rows_BL.flatten()).view(*rows_BL.shape, -1)
        pieces = [piece for piece in self.pieces if piece.single]
        parts = torch.split(rows_BLW, [len(piece.slots) for piece in pieces], dim=1)
        dim = self.matrix.vector
        return [
            piece.run.part(rows, dim=dim, pooled=piece.pooled, ids_BS=ids_BS, floats_BN=floats_BN)
            for piece, rows in zip(pieces, parts, strict=True)
        ]

    def _lists(self, ids_BS: Tensor, floats_BN: Tensor) -> list[Part]:
        """All ids that are there, V of them, one after another; a list of C begins where its first slot stands."""
        ids_BJ, dim = ids_BS.index_select(1, self.list_J), self.matrix.vector
        at_V = (ids_BJ + 1).flatten().nonzero().squeeze(1)  # compiled code would write a mask byte by byte
        rows_VW = self.matrix((ids_BJ + self.list_begin_J).flatten().index_select(0, at_V))
        share_V1, value_V1 = self._scales(at_V, ids_BS=ids_BS, floats_BN=floats_BN)
        entries_VW = torch.cat([rows_VW[:, :dim] * share_V1, rows_VW[:, dim:] * value_V1], dim=1)
        size, slots = ids_BJ.shape
        first_BF = torch.arange(size)[:, None] * slots + self.first_F
        bags_C = torch.searchsorted(at_V, first_BF.flatten())
        pooled_CW = nn.functional.embedding_bag(torch.arange(at_V.shape[0]), entries_VW, bags_C, mode="sum")
        pooled_BFW = pooled_CW.view(*first_BF.shape, -1)
        entries_RK = floats_BN.new_zeros((size * slots, dim)).index_copy(0, at_V, entries_VW[:, :dim])
        lengths = [len(piece.slots) for piece in self.lists]
        entries = torch.split(entries_RK.view(size, slots, dim), lengths, dim=1)
        parts = []
        for piece, pooled_BW, entries_BLK in zip(self.lists, pooled_BFW.unbind(1), entries, strict=True):
            vectors_B1K, linear_BR = pooled_BW[:, None, :dim], pooled_BW[:, dim : dim + 1]
            if piece.pooled:
                parts.append(Part(vectors_B1K, entries_BLK, linear_BR, floats_BN[:, :0]))
            else:
                mask_BL = piece.run.present_BL(ids_BS, floats_BN)
                parts.append(Part(vectors_B1K[:, :0], entries_BLK, linear_BR, mask_BL))
        return parts

    def _scales(self, at_V: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies vectors and first-order weights, [V, 1] each."""
        values = [piece.run.values_BL(ids_BS, floats_BN) for piece in self.lists]
        shares = [
            piece.run.shares_BL(values_BL) if piece.pooled else values_BL
            for piece, values_BL in zip(self.lists, values, strict=True)
        ]
        share_V1, value_V1 = (torch.cat(each, dim=1).flatten()[at_V, None] for each in (shares, values))
        return share_V1, value_V1


class Side(nn.Module):
    """A side's ids and numbers, in the order of its columns, to a part a piece and the dense inputs."""

    def __init__(self, pieces: Sequence[Piece], *, layout: Layout, matrices: Matrices, columns: Columns) -> None:
        super().__init__()
        own = [_counted(piece, columns) for piece in pieces]
        full = [piece for piece in own if piece.run.start < layout.vectors]
        self.lookups = nn.ModuleList(
            Lookup(part, layout=layout, matrix=matrix, columns=columns.ids)
            for part, matrix in ((full, matrices.rows), (own[len(full) :], matrices.weights))
            if part and matrix
        )
        self.dense = sum(place < layout.sizes.dense for place in columns.floats)

    def forward(self, ids_BS: Tensor, floats_BN: Tensor) -> tuple[list[Part], Tensor]:
        parts = [part for lookup in self.lookups for part in lookup(ids_BS, floats_BN)]
        return parts, floats_BN[:, : self.dense]


class Reader(nn.Module):
    """What the head reads, from rows, or from users and their candidates: then a user's columns are read once."""

    user: Side
    candidates: Side

    def __init__(self, layout: Layout, matrices: Matrices, *, split: Split | None = None) -> None:
        super().__init__()
        self.layout, self.split = layout, split
        pieces = [Piece(run, run not in layout.unpooled, of_user=False) for run in layout.runs]
        floats = [layout.sizes.dense, *(run.floats + run.stop - run.start for run in layout.runs if run.floats >= 0)]
        every = Columns(range(max(layout.columns, default=-1) + 1), range(max(floats)))
        self.rows = Side(pieces, layout=layout, matrices=matrices, columns=every)
        if split is None:
            return
        parted = [part for piece in pieces for part in _parted(piece, layout=layout, of_user=split.user)]
        self.order = [piece.of_user for piece in parted]
        for name, columns, side in (("user", split.user, True), ("candidates", split.candidates, False)):
            some = [piece for piece in parted if piece.of_user == side]
            self.add_module(name, Side(some, layout=layout, matrices=matrices, columns=columns))
        self.dense = list(_stretches(place in split.user.floats for place in range(layout.sizes.dense)))

    def forward(self, ids_BS: Tensor, floats_BN: Tensor, user: User | None = None) -> Inputs:
        """With a user the ids and floats are those of the other columns alone."""
        if user is None:
            parts, dense_BN = self.rows(ids_BS, floats_BN)
            return self.layout.joined(parts, dense_BN=dense_BN)
        of_user, dense_UN = self.user(user.ids_US, user.floats_UN)
        own, dense_BN = self.candidates(ids_BS, floats_BN)
        of_user = [Part(*(tensor.index_select(0, user.of_row_B) for tensor in part)) for part in of_user]
        sources = {True: iter(of_user), False: iter(own)}
        parts = [next(sources[side]) for side in self.order]
        dense = {True: dense_UN.index_select(0, user.of_row_B), False: dense_BN}
        columns = [dense[side][:, start:stop] for side, start, stop in self.dense]
        return self.layout.joined(parts, dense_BN=torch.cat([floats_BN[:, :0], *columns], dim=1))


def _counted(piece: Piece, columns: Columns) -> Piece:
    """With places of ids and values among the columns of a side; plain runs are found by their slots."""
    run = piece.run
    ids = -1 if run.plain else columns.ids.index(run.ids)
    floats = -1 if run.floats < 0 else columns.floats.index(run.floats)
    return piece._replace(run=run._replace(ids=ids, floats=floats))


def _parted(piece: Piece, *, layout: Layout, of_user: Columns) -> list[Piece]:
    """The pieces of one side each."""
    found = []
    for side, group in groupby(piece.slots, key=lambda at: layout.columns[at] in of_user.ids):
        slots = list(group)
        found.append(Piece(piece.run._replace(start=slots[0], stop=slots[-1] + 1), piece.pooled, side))
    return found


def _stretches(of_user: Iterable[bool]) -> Iterator[tuple[bool, int, int]]:
    """Neighbours of one side: whether it is the user's, and where they start and stop among all of that side."""
    ends = {True: 0, False: 0}
    for side, group in groupby(of_user):
        start, ends[side] = ends[side], ends[side] + len(list(group))
        yield side, start, ends[side]
