"""The order of the house: who may import whom, what no file is called, one vocabulary for what happens."""

import ast
import graphlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from kamiyo import telemetry
from tests.conftest import ROOT, tracked

# From the ground up. A part may import only from floors below its own, so that every file can be read with
# nothing in mind but what is beneath it. Parts of one floor do not know each other.
FLOORS: list[set[str]] = [
    {"errors"},
    {"settings", "telemetry"},
    {"signature", "event", "retry", "watchdog", "tracing"},
    {"envelope", "shapes"},
    {"postgres", "database"},
    {"stripe_api"},
    {"projections"},
    {"inbox", "refused"},
    {"ties", "mirror"},
    {"reads"},
    {"handlers", "rebuild", "alerts", "simulator"},
    {"receive", "turn", "shadow", "upgrade", "reconcile", "reader", "backfill", "audit", "conform", "doctor"},
    {"worker"},
    {"web"},
    {"cli", "testing"},
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}

#: Files that only open the house for others, and may see whatever is in it.
WINDOWS = {"kamiyo", "kamiyo.__main__"}

UNWANTED = {"utils", "util", "common", "helpers", "misc", "models", "services", "repositories", "managers"}

SOURCES = sorted(path for folder in ("kamiyo", "api") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported_by(module: str) -> Iterator[tuple[str, str, int]]:
    """What `module` imports of this project: the module, the name in it (or ""), and the line."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}:{node.lineno}: say the whole name"
            # `from kamiyo import inbox` names a module, `from kamiyo.inbox import put` something in one.
            found = [
                (whole, "") if (whole := f"{node.module}.{alias.name}") in MODULES else (node.module, alias.name)
                for alias in node.names
            ]
        else:
            continue
        yield from ((name, what, node.lineno) for name, what in found if name.split(".")[0] in ("kamiyo", "api"))


def part_of(module: str) -> str:
    """The part a module belongs to: itself, or the package it is in."""
    return module.split(".")[1]


# ── Who may import whom ───────────────────────────────────────────────────────────────────────────────────


def test_every_part_has_a_floor() -> None:
    parts = {part_of(module) for module in MODULES if module.startswith("kamiyo.")} - {"__main__"}
    assert parts <= set(FLOOR)


@pytest.mark.parametrize("module", sorted(set(MODULES) - WINDOWS))
def test_imports_come_from_below(module: str) -> None:
    for name, what, line in imported_by(module):
        where = f"{module}:{line} imports {what} from {name}"
        if module.split(".")[0] == "api":
            assert name == "kamiyo.web", where
        elif name == "kamiyo":
            assert what == "__version__", where
        else:
            assert name.startswith("kamiyo."), where
            assert part_of(name) == part_of(module) or FLOOR[part_of(name)] < FLOOR[part_of(module)], where


def test_no_module_needs_itself_to_be_imported() -> None:
    # `kamiyo/__init__.py` is left out: it is imported before everything, and only shows what is inside.
    needs = {
        module: {name for name, _, _ in imported_by(module)} - WINDOWS - {module} for module in set(MODULES) - WINDOWS
    }
    assert list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError with the circle


def test_no_import_hides_in_a_function_without_its_reason_beside_it() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        commented = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        }
        for function in ast.walk(MODULES[module_of(path)]):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    where = f"{path.relative_to(ROOT)}:{node.lineno}: {lines[node.lineno - 1].strip()}"
                    assert {node.lineno, node.lineno - 1} & commented, where


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_are_named_by_what_they_are_responsible_for() -> None:
    allowed = {ROOT / "kamiyo" / "web" / "models.py"}  # what /docs calls them
    for folder in ("kamiyo", "api", "tests", "bench", "scripts", "database"):
        for path in (ROOT / folder).rglob("*.py"):
            ours = not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
            assert not ours or path.stem not in UNWANTED or path in allowed, path


def test_the_repository_holds_no_links_out_of_itself() -> None:
    """A link that leads out of a working copy, or to itself, works for the person who made it and for nobody else."""
    links = [name for name in tracked() if (ROOT / name).is_symlink()]
    assert [name for name in links if not _leads_into_the_repository(ROOT / name)] == []


def _leads_into_the_repository(link: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(ROOT)
    except (OSError, RuntimeError):  # it leads nowhere, or to itself
        return False


def test_every_module_says_what_it_is() -> None:
    assert [module for module, tree in MODULES.items() if not ast.get_docstring(tree)] == []


def happenings() -> Iterator[tuple[str, ast.Call]]:
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("happened", "happened_to_each"):
                    yield module, node


def test_what_is_said_to_happen_and_what_can_be_logged_are_the_same_list() -> None:
    said = set()
    for module, call in happenings():
        name = call.args[0]
        assert isinstance(name, ast.Constant), f"{module}:{call.lineno}: the name must stand there to be read"
        said.add(name.value)
    assert said == set(telemetry._LEVELS)


def test_no_fact_of_what_happened_is_of_a_kind_that_holds_secrets_or_customers() -> None:
    unwanted = re.compile(r"body|payload|secret|_key|header|signature|email|name|message|url|customer|traceback|value")
    facts = {(module, keyword.arg) for module, call in happenings() for keyword in call.keywords if keyword.arg}
    assert [(module, fact) for module, fact in facts if unwanted.search(fact)] == []


def test_only_telemetry_words_log_lines() -> None:
    for module, tree in MODULES.items():
        if module == "kamiyo.telemetry":
            continue
        imported = {
            name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not imported & {"logging", "structlog"}, module


# ── SQL ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", sorted((ROOT / "kamiyo").glob("*.sql")), ids=lambda path: path.name)
def test_every_named_query_is_used_and_every_used_one_is_named(path: Path) -> None:
    named = re.findall(r"^-- name: (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    used: set[str] = set()
    patterns: set[str] = set()
    for source, tree in zip(SOURCES, MODULES.values(), strict=True):
        if f'load_queries("{path.name}")' not in source.read_text(encoding="utf-8"):
            continue
        for lookup in ast.walk(tree):
            if isinstance(lookup, ast.Subscript) and getattr(lookup.value, "id", "") == "_SQL":
                if isinstance(lookup.slice, ast.JoinedStr):  # f"forget_{table}"
                    parts = (getattr(part, "value", "") for part in lookup.slice.values)
                    patterns.add("".join(part if isinstance(part, str) else r"\w+" for part in parts))
                elif isinstance(lookup.slice, ast.Name):  # the name comes from elsewhere in the file
                    used |= set(named) & _texts(tree)
                else:
                    used |= _texts(lookup.slice)
    unused = {name for name in set(named) - used if not any(re.fullmatch(p, name) for p in patterns)}
    assert (used - set(named), unused) == (set(), set())


def _texts(tree: ast.AST) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_sql_is_never_put_together_from_values() -> None:
    # A value goes in as a parameter; whatever else is put into SQL has its reason here.
    found = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        and re.match(
            r"\s*(SELECT|INSERT|UPDATE|DELETE|DROP|ALTER|CREATE|SET|LOCK)\b",
            "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)),
        )
    ]
    # `CREATE DATABASE` takes no parameter, and the name is a constant; the doctor words advice, and runs none of it.
    assert {place.split(":")[0] for place in found} <= {"kamiyo.postgres.server", "kamiyo.doctor.postgresql"}


def test_what_runs_alone_is_a_story_for_make_looks_for_it_nowhere_else() -> None:
    alone = [path for path in (ROOT / "tests").rglob("*.py") if "pytest.mark." + "alone" in path.read_text("utf-8")]
    assert alone and {path.parent.name for path in alone} == {"stories"}
    assert "-m alone tests/stories" in (ROOT / "Makefile").read_text(encoding="utf-8")
