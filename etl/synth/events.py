"""A log of impressions in the order of time: who saw which item, clicked it, bought it, and had clicked what before."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.synth.draws import Draws, unit, zipf
from etl.synth.truth import Known, probability
from etl.transform import Float64s, Int64s

START_MS = 1_704_067_200_000  # 1 January 2024, UTC
DAY_MS = 86_400_000
HISTORY = 20
SEGMENTS = ("student", "worker", "parent", "retired", "gamer", "runner", "reader", "cook")
DEVICES = ("phone", "desktop", "tablet")
PLACEMENTS = ("top", "feed", "side", "search", "mail", "end")
COUNTRIES = ("de", "fr", "it", "es", "pl", "nl", "at", "ch", "se", "cz")
_RANK = 3
_GRID = np.linspace(0, 1, 1441)
_MINUTES = _GRID - 0.6 / (2 * math.pi) * (np.sin(2 * math.pi * (_GRID - 1 / 6)) + math.sin(math.pi / 3))


@dataclass(frozen=True)
class _Users:
    """By user: id, segment, how often he clicks and buys at all."""

    ids: Int64s
    segments: Int64s
    clicks: Float64s
    buys: Float64s


@dataclass(frozen=True)
class _Items:
    """By item: id, category, how often it is clicked on the first and on the last day and bought, price, first day.

    `released` is a time from 0 (the start) to 1 (the end); below 0 for older items.
    """

    ids: Int64s
    categories: Int64s
    clicks: Float64s
    clicks_later: Float64s
    buys: Float64s
    prices: Float64s
    released: Float64s


@dataclass(frozen=True)
class _Shown:
    """A batch before anybody reacts: user and item by row, and the click's logit by first-order effects and pairs."""

    at: Int64s
    users: Int64s
    items: Int64s
    first_order: Float64s
    pairs: Float64s


@dataclass(frozen=True)
class _Reactions:
    """By row: what the history adds to the click's logit, the click, the last items clicked before (-1 first, where
    there were fewer than 20), and how many those were in all.
    """

    interest: Float64s
    clicks: npt.NDArray[np.bool_]
    histories: npt.NDArray[np.int32]
    clicked_before: Int64s


class Events:
    """Makes batches of rows one after another, since a click depends on the user's clicks before it."""

    def __init__(self, seed: int, *, rows: int, days: int, users: int | None, items: int | None) -> None:
        self._draws, self._rows, self._days = Draws(seed), rows, days
        self._users = self._people(users or max(100, rows // 50))
        self._items = self._catalogue(items or max(50, rows // 500))
        normals = self._draws.normals
        self._taste = normals("segments", len(SEGMENTS) * _RANK).reshape(-1, _RANK)
        self._appeal = normals("categories", self._category_count * _RANK).reshape(-1, _RANK)
        self._fit = 0.35 * normals("device x placement", len(DEVICES) * len(PLACEMENTS))
        self._history = np.full((len(self._users.ids), HISTORY), -1, np.int32)
        self._clicked = np.zeros(len(self._users.ids), np.int64)

    def _people(self, size: int) -> _Users:
        at, draws = np.arange(size), self._draws
        segments = (draws.uniform("user.segment", at) * len(SEGMENTS)).astype(np.int64)
        clicks, buys = (0.35 * draws.normals(f"user.{what}", size) for what in ("clicks", "buys"))
        return _Users(_ids(draws, "user.id", at=at), segments, clicks, buys)

    def _catalogue(self, size: int) -> _Items:
        at, draws = np.arange(size), self._draws
        self._category_count = min(30, max(2, size // 10))
        self._old = max(1, math.ceil(0.8 * size))
        clicks, buys, changes = (0.45 * draws.normals(f"item.{what}", size) for what in ("clicks", "buys", "changes"))
        age = -20 * draws.uniform("item.age", at)
        new = (at - self._old + 1) / (size - self._old + 1)
        return _Items(
            ids=_ids(draws, "item.id", at=at),
            categories=zipf(draws.uniform("item.category", at), self._category_count),
            clicks=clicks,
            clicks_later=0.9 * clicks + 0.4 * changes,
            buys=buys,
            prices=np.round(20 * np.exp(0.8 * draws.normals("item.price", size)), 2),
            released=np.where(at < self._old, age, new),
        )

    def batch(self, first: int, count: int) -> tuple[pa.Table, Known]:
        """The next rows, `first` being the number of those before.

        Columns: timestamp (int64, milliseconds), user, item, category (int64), segment, device, placement, country
        (texts), hour (int64), price, item_age (days), user_clicks (numbers), history and history_category (lists of the
        last 20 clicked items and their categories, oldest first), click, conversion (int8).
        """
        at = np.arange(first, first + count)
        columns, shown = self._impressions(at)
        reactions = self._react(shown)
        clicks, after_click = reactions.clicks, self._after_click(shown, reactions)
        conversions = clicks & (self._draws.uniform("conversion", at) < probability(after_click))
        columns |= {"user_clicks": pa.array(reactions.clicked_before), **self._listed(reactions.histories)}
        columns |= {"click": pa.array(clicks.view(np.int8)), "conversion": pa.array(conversions.view(np.int8))}
        logits = shown.pairs + reactions.interest
        both = probability(logits) * probability(after_click)
        return pa.table(columns), Known(
            logits={"click": logits, "conversion": np.log(both / (1 - both))},
            labels={"click": clicks, "conversion": conversions},
            parts={"first_order": shown.first_order, "pairs": shown.pairs, "history": logits},
        )

    def _after_click(self, shown: _Shown, reactions: _Reactions) -> Float64s:
        """The logit of a conversion among clicks."""
        people = self._users.buys[shown.users] + self._items.buys[shown.items]
        price = np.log(self._items.prices[shown.items] / 20)
        logits: Float64s = people - 1.3 + 0.6 * reactions.interest - 0.4 * price
        return logits

    def _impressions(self, at: Int64s) -> tuple[dict[str, pa.Array], _Shown]:
        """What is shown to whom, where and when; time and context first."""
        draws, time = self._draws, at / self._rows
        times = self._times(at)
        hours = times // 3_600_000 % 24
        known_users = 1 + (len(self._users.ids) - 1) * (0.9 + 0.1 * time)
        users = (known_users * draws.uniform("user", at) ** 1.5).astype(np.int64)
        items = self._chosen(at)
        device, placement, country = (
            zipf(draws.uniform(name, at), size)
            for name, size in (("device", len(DEVICES)), ("placement", len(PLACEMENTS)), ("country", len(COUNTRIES)))
        )
        prices, ages = self._items.prices[items], _days_old(self._items.released[items], time, days=self._days)
        absent = {name: draws.uniform(f"{name}.null", at) < 0.03 for name in ("country", "item_age")}
        first_order = -1.75 + self._users.clicks[users] + (1 - time) * self._items.clicks[items]
        first_order += time * self._items.clicks_later[items] - 0.25 * np.log(prices / 20)
        first_order -= np.where(absent["item_age"], 0.2, 0.1 * np.log1p(ages))
        first_order += 0.25 * np.cos(2 * math.pi * (hours - 20) / 24) - 0.15 * placement + 0.1 * time
        segments, categories = self._users.segments[users], self._items.categories[items]
        pairs = first_order + 0.5 * np.einsum("br,br->b", self._taste[segments], self._appeal[categories])
        pairs += self._fit[device * len(PLACEMENTS) + placement]
        columns = {
            "timestamp": pa.array(times),
            "user": pa.array(self._users.ids[users]),
            "item": pa.array(self._items.ids[items]),
            "category": pa.array(categories),
            "segment": _texts(SEGMENTS, segments),
            "device": _texts(DEVICES, device),
            "placement": _texts(PLACEMENTS, placement),
            "country": _texts(COUNTRIES, country, null=absent["country"]),
            "hour": pa.array(hours),
            "price": pa.array(prices),
            "item_age": pa.array(np.round(ages, 2), mask=absent["item_age"]),
        }
        return columns, _Shown(at, users, items, first_order, pairs)

    def _times(self, at: Int64s) -> Int64s:
        """Milliseconds, never falling; nights are quiet. Days hold equally many rows."""
        day = (at * self._days + self._days - 1) // self._rows
        start = day * self._rows // self._days
        rows = (day + 1) * self._rows // self._days - start
        share = np.interp((at - start + 0.5) / rows, _MINUTES, _GRID)
        times: Int64s = START_MS + day * DAY_MS + (share * DAY_MS).astype(np.int64)
        return times

    def _chosen(self, at: Int64s) -> Int64s:
        """The candidate of each row: an old item by popularity, or one of those released since the start."""
        released = (at / self._rows * (len(self._items.ids) - self._old)).astype(np.int64)
        bits = self._draws.bits("item", at)
        uniform = unit(bits)
        fresh = ((bits & np.uint64(0xFF)) < np.uint64(20)) & (released > 0)
        return np.where(fresh, self._old + (uniform * released).astype(np.int64), zipf(uniform, self._old))

    def _react(self, shown: _Shown) -> _Reactions:
        """Rows of one user come one after another: the first rows of all users are worked on together, and so on."""
        uniform = self._draws.uniform("click", shown.at)
        interest, clicks = np.zeros(len(shown.at)), np.zeros(len(shown.at), np.bool_)
        histories, clicked_before = np.empty((len(shown.at), HISTORY), np.int32), np.empty(len(shown.at), np.int64)
        for rows in _rounds(shown.users):
            users, items = shown.users[rows], shown.items[rows]
            histories[rows] = before = self._history[users]
            clicked_before[rows] = self._clicked[users]
            interest[rows] = self._interest(before, items)
            clicks[rows] = clicked = uniform[rows] < probability(shown.pairs[rows] + interest[rows])
            kept = np.concatenate([before[clicked, 1:], items[clicked, None].astype(np.int32)], axis=1)
            self._history[users[clicked]] = kept
            self._clicked[users[clicked]] += 1
        return _Reactions(interest, clicks, histories, clicked_before)

    def _interest(self, before: npt.NDArray[np.int32], items: Int64s) -> Float64s:
        """More, the more of the history has the candidate's category; less where it holds the very item."""
        known = before >= 0
        alike = known & (self._items.categories[before] == self._items.categories[items][:, None])
        share = alike.sum(axis=1) / (known.sum(axis=1) + 1)
        interest: Float64s = 3.5 * share - 0.8 * (before == items[:, None]).any(axis=1) - 0.3
        return interest

    def _listed(self, histories: npt.NDArray[np.int32]) -> dict[str, pa.Array]:
        known = histories >= 0
        items, lengths = histories[known], known.sum(axis=1)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        values = {"history": self._items.ids[items], "history_category": self._items.categories[items]}
        return {name: pa.ListArray.from_arrays(offsets, pa.array(value)) for name, value in values.items()}


def _days_old(released: Float64s, time: Float64s, *, days: int) -> Float64s:
    """Days since the release, never below 0."""
    ages: Float64s = np.maximum(time - released, 0.0) * float(days)
    return ages


def _rounds(users: Int64s) -> list[Int64s]:
    """Positions of each user's first row, of his second, and so on."""
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[order], prepend=-1))
    lengths = np.diff(np.append(starts, len(users)))
    turn = np.empty(len(users), np.int64)
    turn[order] = np.arange(len(users)) - np.repeat(starts, lengths)
    return np.split(np.argsort(turn, kind="stable"), np.cumsum(np.bincount(turn))[:-1])


def _ids(draws: Draws, stream: str, *, at: Int64s) -> Int64s:
    """Identifiers of 62 random bits, as hashed ids of real logs are."""
    return (draws.bits(stream, at) >> np.uint64(2)).view(np.int64)


def _texts(names: tuple[str, ...], at: Int64s, *, null: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(at, mask=null), pa.array(names)).cast(pa.string())
