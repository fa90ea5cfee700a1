"""The model as Triton's Python backend runs it: `model.py` of the repository, beside the bundle's other files.

It serves either kind of request, as its config says: rows, or a user with candidates.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

_WARM_UP_ROWS = (1, 2, 8, 64)
_PACKAGE = "rankforge_bundle"
_RANKED = ("user_", "item_")


class TritonPythonModel:
    """Called by the stub, one object an instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Refuses to serve where this numpy and this stub do not understand each other."""
        torch.set_num_threads(1)
        _check_arrays()
        folder = Path(__file__).parent
        parameters = json.loads(args["model_config"])["parameters"]
        signature = json.loads(parameters["signature"]["string_value"])
        transform, beside = _load(folder, "transform"), _load(folder, "ranker")
        program = _load(folder, "served_program").load_program(folder, device=_device(args))
        ranker = beside.Ranker(folder, transform, program=program)
        self._kinds: list[_Rows | _Ranked] = [_Rows(ranker, beside)]
        if "ranking" in signature:
            self._kinds.append(_Ranked(ranker, beside, module=_load(folder, "ranking"), signature=signature))
        for kind in self._kinds:
            for rows in _WARM_UP_ROWS * 2:
                kind.score([kind.blank(min(rows, signature["max_rows"]))])
        reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        missing = transform.MISSING_NUMBER
        monitor = _load(folder, "monitor").Monitor(reference, tasks=signature["tasks"], missing_number=missing)
        ranker.seen, self._monitor = monitor.seen, monitor
        self._exporter = _load(folder, "exporter").Exporter(
            monitor,
            pb_utils,
            labels={"model": args["model_name"], "version": args["model_version"]},
            instance=args["model_instance_name"],
            alarm=float(parameters["psi_alarm"]["string_value"]),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request: its outputs, or INVALID_ARG with the fault of this request alone."""
        given = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        kinds = [len(self._kinds) - 1 if any(name.startswith(_RANKED) for name in names) else 0 for names in given]
        responses: list[Any] = [None] * len(requests)
        for number, kind in enumerate(self._kinds):
            places = [at for at, other in enumerate(kinds) if other == number]
            read = [kind.read(given[at]) for at in places]
            sound = [request for request in read if not isinstance(request, ValueError)]
            scored = iter(kind.score(sound) if sound else [])
            for at, request in zip(places, read, strict=True):
                result = request if isinstance(request, ValueError) else next(scored)
                responses[at] = self._response(requests[at], result, kind=kind)
        return responses

    def finalize(self) -> None:
        """Hands over the last counts."""
        self._exporter.stop()

    def _response(self, request: Any, result: Any, *, kind: "_Rows | _Ranked") -> Any:
        if isinstance(result, ValueError):
            self._monitor.refused()
            error = pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        self._monitor.scored(result.score)
        names = [name for name in request.requested_output_names() if name in kind.outputs]
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, kind.output(name, result)) for name in names])


class _Rows:
    """Requests of rows: keys [B, C] and numbers [B, M]."""

    outputs = ("score", "ids", "floats")

    def __init__(self, ranker: Any, beside: Any) -> None:
        self._make, self._encoder = beside.Request, ranker.encoder
        self.score, self.blank = ranker.score, ranker.blank

    def read(self, given: Mapping[str, Any]) -> Any:
        """A request, or a ValueError where an input is missing; one without columns is not sent."""
        if not given:
            return ValueError("the request has no input")
        return self._encoder.missing_input(given) or _half(given, "", blank=self.blank, make=self._make)

    def output(self, name: str, scored: Any) -> Any:
        """[B, .]"""
        return np.ascontiguousarray(getattr(scored, name))


class _Ranked:
    """Requests of a user [1, .] and candidates [1, N, .], where Triton's batch is one of users."""

    outputs = ("rank_score", "rank_ids", "rank_floats")

    def __init__(self, ranker: Any, beside: Any, *, module: Any, signature: Mapping[str, Any]) -> None:
        ranking, rows = signature["ranking"], signature["max_rows"]
        self._make, self._module = beside.Request, module
        parts = {"user": ranking["user"], "items": ranking["items"]}
        self._ranking = module.Ranking(ranker, beside, **parts, most=ranking["max_candidates"], rows=rows)
        self.score, self.blank = self._ranking.score, self._ranking.blank

    def read(self, given: Mapping[str, Any]) -> Any:
        """A request, or a ValueError where an input is missing; a request of several users is refused by its shape."""
        if (missing := self._ranking.missing_input(given)) is not None:
            return missing
        if foreign := [name for name in given if not name.startswith(_RANKED)]:
            return ValueError(f"input '{foreign[0]}' is one of rows, beside a user and candidates: send one kind")
        items = {name: array[0] if len(array) == 1 else array for name, array in given.items() if "item_" in name}
        user = _half(given, "user_", blank=lambda _: self.blank(1).user, make=self._make)
        half = _half(items, "item_", blank=lambda rows: self.blank(rows).items, make=self._make)
        return self._module.RankRequest(user, half)

    def output(self, name: str, scored: Any) -> Any:
        """[1, N, .]"""
        return np.ascontiguousarray(getattr(scored, name.removeprefix("rank_")))[None]


def _half(given: Mapping[str, Any], prefix: str, *, blank: Callable[[int], Any], make: Any) -> Any:
    """A request of the inputs with this prefix; one without columns is not sent, and has as many rows as the other."""
    names = (f"{prefix}keys", f"{prefix}numbers")
    if all(name in given for name in names):
        return make(*(given[name] for name in names))
    none = blank(len(next(iter(given.values()))))
    return make(given.get(names[0], none.keys), given.get(names[1], none.numbers))


def _device(args: Mapping[str, str]) -> str:
    """Where the config puts this instance, as torch names it."""
    return f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"


def _check_arrays() -> None:
    """The stub of Triton 2.51 hands out arrays of numpy 2 with every element equal to the first."""
    wanted = np.arange(12, dtype=np.int64).reshape(3, 4)
    got = pb_utils.Tensor.from_dlpack("check", torch.from_numpy(wanted.copy())).as_numpy()
    back = pb_utils.Tensor("check", wanted).as_numpy()
    if not (np.array_equal(got, wanted) and np.array_equal(back, wanted)):
        raise RuntimeError(f"numpy {np.__version__} and this stub corrupt arrays: install numpy<2")


def _load(folder: Path, name: str) -> ModuleType:
    """The module in the file beside this one, whatever else may carry its name; it may import its neighbours."""
    package = sys.modules.setdefault(_PACKAGE, ModuleType(_PACKAGE))
    package.__path__ = [str(folder)]
    return importlib.import_module(f"{_PACKAGE}.{name}")
