"""What is imported when, and what stands in no module: heavy libraries at the edge, no silent except, no sleeping."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from scorers import SCORERS

ROOT = Path(__file__).parents[1]
PACKAGES = ("storage", "scorers", "pipelines", "flows")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

EXECUTORS = {"pipelines/execute.py", "flows/ray_executor.py"}
CATCHERS = EXECUTORS | {"flows/curate.py"}  # Prefect's state raises what the task raised: to ask it is to catch
SLEEPERS = EXECUTORS | {"storage/catalog.py", "flows/prefect_server.py"}  # they wait for other processes

HELP = """
import sys, time
begun = time.perf_counter()
from flows.cli import main
sys.argv = ["corpusmill", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("seconds", round(time.perf_counter() - begun, 3))
print("modules", *sorted(sys.modules))
"""
SPEC = """
import sys
from pipelines.recipe import load_spec
load_spec(sys.argv[1])
print("modules", *sorted(sys.modules))
"""


def printed(program: str, *arguments: str) -> dict[str, list[str]]:
    """The lines that the program prints in a fresh interpreter, by their first word."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}


def test_help_loads_nothing_heavy() -> None:
    told = printed(HELP)
    heavy = {"torch", "ray", "prefect", "duckdb", "pyarrow", "transformers", "numpy"}
    print(f"corpusmill --help: {told['seconds'][0]} s, {len(told['modules'])} modules")
    assert heavy & set(told["modules"]) == set()
    assert "query" in told, "this was no help text"


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_spec_loads_no_model_library(scorer: str) -> None:
    heavy = {"torch", "transformers", "fasttext", "tokenizers", "rensa", "gguf", "ray", "prefect"}
    assert heavy & set(printed(SPEC, scorer)["modules"]) == set()


def test_the_fences_stand() -> None:
    """`make lint` keeps them; here is only that none has been taken down."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = {contract["name"]: contract for contract in linter["contracts"]}
    assert contracts["Imports point down"]["layers"] == ["flows", "pipelines", "scorers", "storage"]
    for name, owner, libraries in (
        ("Prefect and Ray only in flows", "flows", {"prefect", "ray"}),
        ("DuckDB only in storage", "storage", {"duckdb"}),
        ("Torch, transformers and fastText only in scorers", "scorers", {"torch", "transformers", "fasttext"}),
    ):
        assert set(contracts[name]["source_modules"]) == set(PACKAGES) - {owner}
        assert libraries <= set(contracts[name]["forbidden_modules"])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_habits(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text]
    if name not in CATCHERS:
        found += [f"line {line}: swallows every exception" for line in swallowed(tree)]
    if name not in SLEEPERS:
        found += [f"line {line}: sleeps" for line in calls(tree, "sleep")]
    if not name.startswith("flows/"):
        found += [f"line {line}: prints" for line in calls(tree, "print")]
    assert found == []


def swallowed(tree: ast.AST) -> Iterator[int]:
    """Lines of handlers of every exception (bare, Exception, BaseException) that do not end by raising one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id if isinstance(kind, ast.Name) else None for kind in kinds}
            broad = node.type is None or names & {"Exception", "BaseException"}
            if broad and not isinstance(node.body[-1], ast.Raise):
                yield node.lineno


def calls(tree: ast.AST, function: str) -> Iterator[int]:
    """Lines that call a function of that name, alone or as an attribute (time.sleep)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = node.func
            if (named.id if isinstance(named, ast.Name) else getattr(named, "attr", None)) == function:
                yield node.lineno
