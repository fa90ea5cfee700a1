"""Scores ranking requests: one user and N candidates, whose rows are put together here and not by the client.

What reads the user's columns alone is transformed and looked up once a request; what reads a candidate's columns, or
both, once a candidate. Copied into a bundle, so it imports nothing of ours.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
State = Mapping[str, Any]
"""A part of transform.json, or a signature, as JSON values."""
Float32s = npt.NDArray[np.float32]
Halves = tuple[Int64s, Float32s]
"""Ids and floats of some columns."""
_FORWARDS = 8


class Sides(NamedTuple):
    """Places of ids and of floats in the schema's order: the user's, and the others."""

    user: tuple[Int64s, Int64s]
    own: tuple[Int64s, Int64s]


@dataclass(frozen=True)
class RankRequest:
    """Packed columns of one user [1, .] and of its candidates [N, .]: each a `Request` of ranker.py."""

    user: Any
    items: Any


@dataclass(frozen=True)
class Ranked:
    """score float32 [N, T] of one user's candidates; what it was computed from is put together where it is asked for.

    `user` and `own` hold ids and floats, [1, .] and [N, .], `places` where each of them stands in the schema's order.
    """

    score: Float32s
    user: Halves
    own: Halves
    places: Sides

    @property
    def ids(self) -> Int64s:
        """[N, S]"""
        ids: Int64s = self._beside(0)
        return ids

    @property
    def floats(self) -> Float32s:
        """[N, .]"""
        floats: Float32s = self._beside(1)
        return floats

    def _beside(self, part: int) -> Any:
        user, own = self.user[part], self.own[part]
        whole = np.empty((len(own), user.shape[1] + own.shape[1]), own.dtype)
        whole[:, self.places.user[part]], whole[:, self.places.own[part]] = user, own
        return whole


class Ranking:
    """`user` and `items` are the signatures of the two halves of a request, `most` bounds its candidates, `rows` what
    one forward takes. `beside` is the bundle's ranker.py as a module.
    """

    def __init__(self, ranker: Any, beside: Any, *, user: State, items: State, most: int, rows: int) -> None:
        self._ranker, self._beside, self._most, self._rows = ranker, beside, most, rows
        transform, module = ranker.encoder.transform, ranker.module
        read = _columns_read(transform)
        users = users_features(transform, user["columns"])
        own = set(read) - users
        crosses = [step for step in transform.features if step["kind"] == "cross" and step["name"] in own]
        self._helping = frozenset(name for step in crosses for name in step["inputs"]) & users
        shared = {column for name in own | self._helping for column in read[name]} & set(user["columns"])
        both = {
            name: [*items[name], *(column for column in user[name] if column in shared)] for name in ("keys", "numbers")
        }
        parts = {
            "user_": _part(transform, user, features=users, dense=users),
            "item_": _part(transform, items, features=(), dense=()),
            "": _part(transform, {**user, **both}, features=own | self._helping, dense=own),
        }
        self._user, self._items, self._own = (
            beside.Encoder(part, module=module, prefix=prefix) for prefix, part in parts.items()
        )
        self._shared = [_indices(parts["user_"].signature, user[name], shared=shared) for name in ("keys", "numbers")]
        self._places = sides(ranker.features, dense=ranker.dense, users=users)
        self._user_bounds, self._own_bounds = (ranker.bounds.of(*places) for places in self._places)
        helped = [step for step in ranker.features if step["name"] in own | self._helping]
        self._kept = np.array([step["name"] in own for step in helped for _ in range(step["slots"])], bool)

    def score(self, requests: Sequence[RankRequest]) -> list[Any]:
        """A `Ranked` or a ValueError for each request; the rows of all go through the network together.

        So many requests that their rows fill more than eight forwards are taken in groups, which bounds the memory.
        """
        sizes = np.cumsum([len(request.items.keys) for request in requests])
        cuts = np.flatnonzero(np.diff(sizes // (_FORWARDS * self._rows))) + 1
        bounds = [0, *cuts.tolist(), len(requests)]
        return [result for start, end in pairwise(bounds) for result in self._score_group(requests[start:end])]

    def _score_group(self, requests: Sequence[RankRequest]) -> list[Any]:
        results: list[Any] = [self._form_fault(request) for request in requests]
        sound = [at for at, fault in enumerate(results) if fault is None]
        for at, fault in zip(sound, self._user.checked([requests[at].user for at in sound])[0], strict=True):
            results[at] = fault
        sound = [at for at in sound if results[at] is None]
        rows = {at: self._with_user(requests[at]) for at in sound}
        for at, fault in zip(sound, self._own.checked(list(rows.values()))[0], strict=True):
            results[at] = fault
        sound = [at for at in sound if results[at] is None]
        users, own = self._encoded([requests[at].user for at in sound], items=[rows[at] for at in sound])
        scored = self._score_encoded(users, own, counts=[len(rows[at].keys) for at in sound])
        for at, result in zip(sound, scored, strict=True):
            results[at] = result
        return results

    def missing_input(self, given: Collection[str]) -> ValueError | None:
        """An input that has columns and was not given."""
        fault: ValueError | None = self._user.missing_input(given) or self._items.missing_input(given)
        return fault

    def blank(self, candidates: int) -> RankRequest:
        """A sound request of zeros, for warm-up."""
        return RankRequest(self._user.blank(1), self._items.blank(candidates))

    def _form_fault(self, request: RankRequest) -> ValueError | None:
        if len(request.user.keys) != 1:
            return ValueError(f"input 'user_keys' has {len(request.user.keys)} rows, wanted one user a request")
        fault: ValueError | None = self._user.form_fault(request.user) or self._items.form_fault(request.items)
        if fault is not None:
            return fault
        if len(request.items.keys) > self._most:
            got = f"inputs 'item_keys' and 'item_numbers' hold {len(request.items.keys)} candidates"
            return ValueError(f"{got}, at most {self._most}: send them in parts")
        return None

    def _with_user(self, request: RankRequest) -> Any:
        """The candidates' columns, and beside them those of the user that a feature of both reads."""
        size, (keys_at, numbers_at) = len(request.items.keys), self._shared
        keys = np.repeat(request.user.keys[:, keys_at], size, axis=0)
        numbers = np.repeat(request.user.numbers[:, numbers_at], size, axis=0)
        return self._beside.Request(
            np.concatenate([request.items.keys, keys], axis=1), np.concatenate([request.items.numbers, numbers], axis=1)
        )

    def _encoded(self, users: Sequence[Any], *, items: Sequence[Any]) -> tuple[Halves, Halves]:
        """Ids and floats of the users [U, .], and of all candidates [B, .] what is not their users' alone."""
        packed_user, packed = self._user.together(users), self._own.together(items)
        of_user, own = self._user.encode(packed_user), self._own.encode(packed)
        self._ranker.seen(self._user.transform, packed=packed_user, encoded=of_user)
        self._ranker.seen(self._own.transform, packed=packed, encoded=own, skip=self._helping)
        return (of_user.ids, of_user.floats), (own.ids[:, self._kept], own.floats)

    def _score_encoded(self, users: Halves, own: Halves, *, counts: Sequence[int]) -> list[Any]:
        beside = self._beside
        of_users = self._user_bounds.faults(*users, counts=[1] * len(counts))
        of_own = self._own_bounds.faults(*own, counts=counts)
        results: list[Any] = [fault or other for fault, other in zip(of_users, of_own, strict=True)]
        sound = [at for at, fault in enumerate(results) if fault is None]
        if not sound:
            return results
        rows, sizes = beside.rows_of(sound, counts), [counts[at] for at in sound]
        users, own = (users[0][sound], users[1][sound]), (own[0][rows], own[1][rows])
        score_BT = beside.forward(self._ranker.program.ranked, self._batches(users, own, counts=sizes))
        for row, (at, piece) in enumerate(zip(sound, beside.pieces(sizes), strict=True)):
            user, items = ((ids[part], floats[part]) for (ids, floats), part in ((users, [row]), (own, piece)))
            fault = beside.score_fault(score_BT[piece])
            results[at] = fault or Ranked(score_BT[piece], user, items, self._places)
        return results

    def _batches(self, users: Halves, own: Halves, *, counts: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        """Inputs of the program: at most so many candidates, their users, and which of these is each one's."""
        user_B = np.repeat(np.arange(len(counts)), counts)
        for start in range(0, len(user_B), self._rows):
            part = slice(start, start + self._rows)
            first, last = user_B[part][[0, -1]]
            yield *(each[part] for each in own), *(each[first : last + 1] for each in users), user_B[part] - first


def users_features(transform: Any, columns: Collection[str]) -> set[str]:
    """The features and dense inputs that read columns of the user alone."""
    return {name for name, read in _columns_read(transform).items() if read <= set(columns)}


def sides(features: Sequence[State], *, dense: Sequence[State], users: Collection[str]) -> Sides:
    """The places of what is the user's, and of the rest; features and dense inputs are those of the schema."""
    of_slot = np.array([step["name"] in users for step in features for _ in range(step["slots"])], bool)
    values = [step["name"] in users for step in features if step["weighted"] for _ in range(step["slots"])]
    of_float = np.array([step["name"] in users for step in dense] + values, bool)
    user, own = ((np.flatnonzero(of_slot == side), np.flatnonzero(of_float == side)) for side in (True, False))
    return Sides(user, own)


def _columns_read(transform: Any) -> dict[str, set[str]]:
    """The raw columns behind each feature and each dense input."""
    read: dict[str, set[str]] = {}
    for step in transform.features:
        if step["kind"] == "cross":
            read[step["name"]] = set().union(*(read[name] for name in step["inputs"]))
        else:
            read[step["name"]] = {step["column"], *([step["weights"]] if step.get("weights") else [])}
    return read | {step["name"]: set(step["by"]) if "by" in step else {step["column"]} for step in transform.dense}


def _part(transform: Any, signature: State, *, features: Collection[str], dense: Collection[str]) -> Any:
    """The transform of some features, on packed rows of some columns; it shares the vocabularies."""
    state = {
        "signature": {**signature, "slots": transform.signature.slots},
        "features": [step for step in transform.features if step["name"] in features],
        "dense": [step for step in transform.dense if step["name"] in dense],
    }
    return type(transform)(state, transform.vocabularies, encodings=transform.encodings)


def _indices(signature: Any, names: Sequence[str], *, shared: Collection[str]) -> Int64s:
    """Places of the shared columns in a packed matrix."""
    places = signature.places(names)
    found = [np.arange(places[name].start, places[name].stop) for name in names if name in shared]
    return np.concatenate([np.zeros(0, np.int64), *found])
