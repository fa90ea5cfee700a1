"""The budgets and borders of the code, as tests over its syntax trees.

Complexity is ruff's (C901), import directions are import-linter's; `make lint` runs both and this.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("etl", "recsys", "deploy")
FILE_LINES = 300
MODEL_LINES = 120
FUNCTION_LINES = 50
TRAIN_LINES = 59
ARGUMENTS = 6
POSITIONAL = 2
CALLED_BY_TORCH = {"forward", "backward", "setup_context"}
C_LOOP = "loop"
"""Makes a C function of what it decorates (etl/engines/loops.py); C passes by position."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """One Python file: its path from the root, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def in_package(self) -> bool:
        return self.path.startswith(tuple(f"{name}/" for name in PACKAGES))

    def at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.path}:{node.lineno}"


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, path))


def sources() -> list[Source]:
    """Every file that the budgets hold for."""
    folders = [ROOT / name for name in PACKAGES]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    paths += sorted((ROOT / "scripts").glob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
    return [parse(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def functions(source: Source) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(source.tree) if isinstance(node, FunctionNode))


def public_functions(body: list[ast.stmt]) -> Iterator[FunctionNode]:
    """Functions and methods that others may call: no leading underscore, __init__ and __call__ included."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, FunctionNode) and (
            not node.name.startswith("_") or node.name in {"__init__", "__call__"}
        ):
            yield node


def positional(function: FunctionNode) -> list[str]:
    """Names of the parameters that may be passed by position, without self and cls."""
    names = [arg.arg for arg in function.args.posonlyargs + function.args.args]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain, '' for anything else."""
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def imported(source: Source) -> Iterator[tuple[ast.stmt, str]]:
    """Each name a file imports, spelled out: `from a import b` is a.b, `from . import b` is .b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node, f"{base}.{alias.name}" if node.module else base + alias.name) for alias in node.names)


def file_too_long(source: Source) -> Iterator[str]:
    budget = MODEL_LINES if source.path.startswith("recsys/models/") else FILE_LINES
    lines = len(source.text.splitlines())
    if lines > budget:
        yield f"{source.path}:{lines}: {lines} lines, the budget is {budget}"


def function_too_long(source: Source) -> Iterator[str]:
    for function in functions(source):
        is_story = source.path == "recsys/train.py" and function.name == "train"
        budget = TRAIN_LINES if is_story else FUNCTION_LINES
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > budget:
            yield f"{source.at(function)}: {function.name}() has {lines} lines, the budget is {budget}"


def too_many_arguments(source: Source) -> Iterator[str]:
    for function in functions(source):
        count = len(positional(function)) + len(function.args.kwonlyargs)
        if count > ARGUMENTS:
            yield f"{source.at(function)}: {function.name}() takes {count} arguments, the budget is {ARGUMENTS}"


def not_keyword_only(source: Source) -> Iterator[str]:
    for function in functions(source):
        fixed_by_framework = function.name in CALLED_BY_TORCH or (
            function.name.startswith("__") and function.name.endswith("__")
        )
        fixed_by_framework |= any(
            isinstance(of, ast.Call) and dotted(of.func) == C_LOOP for of in function.decorator_list
        )
        count = len(positional(function))
        if count > POSITIONAL and not fixed_by_framework:
            yield f"{source.at(function)}: {function.name}() takes {count} by position, the budget is {POSITIONAL}"


def distributed_outside_parallel(source: Source) -> Iterator[str]:
    if not source.in_package or re.match(r"recsys/parallel(/|\.py$)", source.path):
        return
    used = [(source.at(node), name) for node, name in imported(source)]
    used += [(source.at(node), dotted(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    for place, name in sorted(set(used)):
        if re.match(r"(torch|torchrec)\.distributed(\.|$)", name):
            yield f"{place}: {name} is used outside recsys/parallel"


def open_signature(source: Source) -> Iterator[str]:
    if not source.in_package:
        return
    for function in public_functions(source.tree.body):
        if function.args.kwarg:
            yield f"{source.at(function)}: {function.name}() takes **{function.args.kwarg.arg}: name the arguments"
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        for annotation in [*(arg.annotation for arg in arguments), function.returns]:
            text = ast.unparse(annotation) if annotation else ""
            if re.search(r"\b([Dd]ict|\w*Mapping)\[str, (typing\.)?Any\]", text):
                yield f"{source.at(function)}: {function.name}() has {text} in its signature: make it a dataclass"


def print_outside_cli(source: Source) -> Iterator[str]:
    is_cli = {"cli", "cli.py", "__main__.py"} & set(source.path.split("/"))
    for node in ast.walk(source.tree):
        if source.in_package and not is_cli and isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield f"{source.at(node)}: print() outside a cli module: return the value, or log it"


def assert_statement(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if source.in_package and isinstance(node, ast.Assert):
            yield f"{source.at(node)}: assert vanishes under python -O: raise an error that names the remedy"


def lines_of(count: int) -> str:
    return "x = 1\n" * count


def function_of(count: int, name: str = "f") -> str:
    return f"def {name}():\n" + "    x = 1\n" * (count - 1)


Rule = Callable[[Source], Iterator[str]]

# For each rule: what it must report, and beside it what it must let pass.
EXAMPLES: list[tuple[Rule, tuple[str, str], tuple[str, str]]] = [
    (file_too_long, ("etl/a.py", lines_of(301)), ("etl/a.py", lines_of(300))),
    (file_too_long, ("recsys/models/fm.py", lines_of(121)), ("recsys/models/fm.py", lines_of(120))),
    (function_too_long, ("etl/a.py", function_of(51)), ("etl/a.py", function_of(50))),
    (function_too_long, ("scripts/a.py", function_of(52, "train")), ("scripts/a.py", function_of(50, "train"))),
    (function_too_long, ("recsys/train.py", function_of(60, "train")), ("recsys/train.py", function_of(59, "train"))),
    (
        too_many_arguments,
        ("etl/a.py", "def f(a, *, b, c, d, e, g, h): ..."),
        ("etl/a.py", "def f(a, *, b, c, d, e, g): ..."),
    ),
    (
        too_many_arguments,
        ("etl/a.py", "class A:\n def f(self, a, b, *, c, d, e, g, h): ..."),
        ("etl/a.py", "class A:\n def f(self, a, b, *, c, d, e, g): ..."),
    ),
    (not_keyword_only, ("etl/a.py", "def f(a, b, c): ..."), ("etl/a.py", "def f(a, b, *, c): ...")),
    (
        not_keyword_only,
        ("etl/a.py", "class A:\n async def f(self, a, b, c): ..."),
        ("etl/a.py", "def f(self, a, b): ..."),
    ),
    (not_keyword_only, ("etl/a.py", "def forwards(a, b, c): ..."), ("etl/a.py", "def forward(self, a, b, c): ...")),
    (not_keyword_only, ("etl/a.py", "@b(d)\ndef f(a, b, c): ..."), ("etl/a.py", "@loop(d)\ndef f(a, b, c): ...")),
    (
        distributed_outside_parallel,
        ("recsys/a.py", "def f():\n    from torch.distributed.checkpoint import save"),
        ("recsys/parallel/a.py", "from torch.distributed.checkpoint import save"),
    ),
    (
        distributed_outside_parallel,
        ("deploy/a.py", "from torch import distributed"),
        ("deploy/a.py", "from torch import nn"),
    ),
    (
        distributed_outside_parallel,
        ("recsys/a.py", "import torch\ntorch.distributed.barrier()"),
        ("recsys/parallel.py", "import torch\ntorch.distributed.barrier()"),
    ),
    (
        distributed_outside_parallel,
        ("etl/a.py", "import torchrec.distributed as d"),
        ("etl/a.py", "import torchrec as d"),
    ),
    (open_signature, ("etl/a.py", "def f(**kwargs): ..."), ("etl/a.py", "def _f(**kwargs): ...")),
    (
        open_signature,
        ("etl/a.py", "class A:\n def __init__(self, **k): ..."),
        ("etl/a.py", "class _A:\n def f(self, **k): ..."),
    ),
    (
        open_signature,
        ("etl/a.py", "def f(*, a: 'list[dict[str, Any]]'): ..."),
        ("etl/a.py", "def f(*, a: dict[str, int]): ..."),
    ),
    (open_signature, ("etl/a.py", "def f() -> Mapping[str, Any] | None: ..."), ("etl/a.py", "def f() -> Any: ...")),
    (print_outside_cli, ("recsys/train.py", "def f():\n    print(1)"), ("recsys/cli.py", "print(1)")),
    (print_outside_cli, ("deploy/client.py", "print(1)"), ("scripts/a.py", "print(1)")),
    (assert_statement, ("etl/a.py", "def f(x):\n    assert x"), ("scripts/a.py", "assert x")),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in EXAMPLES))


@pytest.mark.parametrize(("rule", "bad", "good"), EXAMPLES)
def test_the_rule_reports_what_breaks_it_and_nothing_else(
    rule: Rule, bad: tuple[str, str], good: tuple[str, str]
) -> None:
    faults = list(rule(parse(*bad)))
    assert faults
    assert all(re.match(rf"{re.escape(bad[0])}:\d+: ", fault) for fault in faults)
    assert list(rule(parse(*good))) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule: Rule) -> None:
    faults = [fault for source in sources() for fault in rule(source)]
    assert not faults, "\n" + "\n".join(faults)


def test_the_sources_are_found() -> None:
    """Otherwise every rule above would hold for nothing."""
    paths = {source.path for source in sources()}
    assert {"etl/__init__.py", "recsys/__init__.py", "deploy/__init__.py", "scripts/setup.py"} <= paths


def test_shipped_experiments_are_toml() -> None:
    faults = []
    for path in sorted((ROOT / "experiments").rglob("*.toml")):
        try:
            tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            faults.append(f"{path.relative_to(ROOT)}: not TOML: {error}")
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("module", ["etl", "etl.cli", "deploy", "deploy.client"])
def test_torch_stays_unloaded(module: str) -> None:
    """Also through __init__ files and third-party packages, which the import graph does not show."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import {module} loads torch, or fails: {done.stderr}"
