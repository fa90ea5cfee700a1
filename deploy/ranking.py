"""Scores ranking requests: one user and N candidates, whose rows are put together here and not by the client.

What reads the user's columns alone is transformed once a request; what reads a candidate's columns, or both, once a
candidate. Copied into a bundle, so it imports nothing of ours.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
State = Mapping[str, Any]
"""A part of transform.json, or a signature, as JSON values."""
_FORWARDS = 8


@dataclass(frozen=True)
class RankRequest:
    """Packed columns of one user [1, .] and of its candidates [N, .]: each a `Request` of ranker.py."""

    user: Any
    items: Any


class Ranking:
    """`user` and `items` are the signatures of the two halves of a request, `most` bounds its candidates, `rows` what
    one forward takes. `beside` is the bundle's ranker.py as a module.
    """

    def __init__(self, ranker: Any, beside: Any, *, user: State, items: State, most: int, rows: int) -> None:
        self._ranker, self._request, self._most, self._rows = ranker, beside.Request, most, rows
        transform, module = ranker.encoder.transform, ranker.module
        read = _columns_read(transform)
        users = {name for name, columns in read.items() if columns <= set(user["columns"])}
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
        self._places = {"user": _places(ranker, users), "own": _places(ranker, own)}
        helped = [step for step in ranker.features if step["name"] in own | self._helping]
        self._kept = np.array([step["name"] in own for step in helped for _ in range(step["slots"])], bool)

    def score(self, requests: Sequence[RankRequest]) -> list[Any]:
        """A `Scored` of N rows or a ValueError for each request; the rows of all go through the network together.

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
        counts = np.array([len(rows[at].keys) for at in sound], np.int64)
        ids_BS, floats_BN = self._encode(
            [requests[at].user for at in sound], items=[rows[at] for at in sound], counts=counts
        )
        scored = self._ranker.score_encoded(ids_BS, floats_BN, counts=counts.tolist(), most=self._rows)
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
        return self._request(
            np.concatenate([request.items.keys, keys], axis=1), np.concatenate([request.items.numbers, numbers], axis=1)
        )

    def _encode(self, users: Sequence[Any], *, items: Sequence[Any], counts: Int64s) -> tuple[Any, Any]:
        """ids [B, S] and floats [B, N] of all candidates, in the order of the schema."""
        packed_user, packed = self._user.together(users), self._own.together(items)
        of_user, own = self._user.encode(packed_user), self._own.encode(packed)
        self._ranker.seen(self._user.transform, packed=packed_user, encoded=of_user)
        self._ranker.seen(self._own.transform, packed=packed, encoded=own, skip=self._helping)
        (user_ids, user_floats), (own_ids, own_floats) = self._places["user"], self._places["own"]
        ids_BS = np.empty((counts.sum(), len(user_ids) + len(own_ids)), np.int64)
        floats_BN = np.empty((counts.sum(), len(user_floats) + len(own_floats)), np.float32)
        ids_BS[:, user_ids], ids_BS[:, own_ids] = np.repeat(of_user.ids, counts, axis=0), own.ids[:, self._kept]
        floats_BN[:, user_floats] = np.repeat(of_user.floats, counts, axis=0)
        floats_BN[:, own_floats] = own.floats
        return ids_BS, floats_BN


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


def _places(ranker: Any, names: Collection[str]) -> tuple[Int64s, Int64s]:
    """Where the slots and the floats of some features and dense inputs stand in the schema's order."""
    ids = [step["name"] in names for step in ranker.features for _ in range(step["slots"])]
    weighted = [step for step in ranker.features if step["weighted"]]
    values = [step["name"] in names for step in weighted for _ in range(step["slots"])]
    floats = [step["name"] in names for step in ranker.dense] + values
    return np.flatnonzero(ids), np.flatnonzero(floats)
