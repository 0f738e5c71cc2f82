"""What is generated is current, what the documents name exists, and what has to be explained is."""

import re
from pathlib import Path

import asyncpg
import pytest

from docs import generate
from kamiyo import database, settings
from tests.conftest import PREFIX, ROOT, NewDatabase, run_apart
from tests.docs.conftest import (
    ARCHITECTURE,
    DECISIONS,
    DEPLOY,
    DOCUMENTS,
    GUIDE,
    OPERATIONS,
    README,
    blocks,
    code_of,
    every_document,
    named,
)
from tests.test_house import FLOORS

# ── What is generated is current ────────────────────────────────────────────────────────────────────────────


def test_the_reference_is_what_the_code_says() -> None:
    written = generate.REFERENCE.read_text(encoding="utf-8")
    assert written == generate.reference(), "run: python -m docs.generate"


def test_the_example_settings_are_what_the_code_says() -> None:
    written = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert written == settings.env_example(), "run: python -m kamiyo.settings > .env.example"


# ── What is named exists ────────────────────────────────────────────────────────────────────────────────────


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@every_document
def test_every_internal_link_leads_somewhere(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_setting_named_exists(document: Path) -> None:
    elsewhere = "".join(
        (ROOT / path).read_text(encoding="utf-8") for path in ("scripts/test_webhooks.sh", "tests/conftest.py")
    )
    known = {*generate.setting_names(), *re.findall(r"\bKAMIYO_[A-Z_]+\b", elsewhere)}
    assert set(re.findall(r"\bKAMIYO_[A-Z_]+\b", document.read_text(encoding="utf-8"))) <= known


@every_document
def test_every_command_named_exists(document: Path) -> None:
    commands = generate.commands()
    for line in code_of(document).splitlines():
        told = line.partition("#")[0]
        for found in re.finditer(r"(?:^|[\s/])kamiyo (?!import )([a-z]+(?:-[a-z]+)*)(?: ([a-z]+))?", told):
            words = " ".join(filter(None, found.groups()))
            command = commands.get(words) or commands.get(found[1])
            assert command is not None, f"kamiyo {words}: there is no such command"
            options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            given = re.findall(r"(?<=\s)--[a-z-]+", line[found.end() :].partition("#")[0])
            assert set(given) <= options, f"kamiyo {words}: of {given} it knows {options}"


@every_document
def test_every_make_target_named_exists(document: Path) -> None:
    files = [ROOT / "Makefile", *(ROOT / "bench").glob("*.mk")]
    known = [target for file in files for target in re.findall(r"^([a-z-]+):", file.read_text("utf-8"), re.MULTILINE)]
    assert set(re.findall(r"(?:^|\s)make ([a-z-]+)", code_of(document), re.MULTILINE)) <= set(known)


@every_document
def test_every_http_call_named_exists(document: Path) -> None:
    known = {path for _, path in generate.calls(generate.openapi())}
    for path in re.findall(rf"{PREFIX}/[a-z_{{}}/-]+[a-z}}]", document.read_text(encoding="utf-8")):
        assert path in known, f"{path}: there is no such call"


@every_document
def test_every_file_named_exists(document: Path) -> None:
    places = r"`((?:kamiyo|api|database|scripts|docs|tests|bench)/[\w./-]+)`"
    for path in re.findall(places, document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{path}: there is no such file"


def test_every_place_on_the_map_of_the_house_exists() -> None:
    [house] = [block for block in blocks(README, "") if "kamiyo/receive.py" in block.text]
    for line in house.text.splitlines():
        for place in line.split("  ")[0].split(" · "):
            assert (ROOT / place).exists(), f"{place}: there is no such place"


@pytest.fixture(scope="module")
def names_in_database(new_database: NewDatabase) -> set[str]:
    """Every table, view, column, function, type and sequence that the migrations make."""

    async def ask() -> set[str]:
        with_schema = "CASE nspname WHEN 'billing' THEN 'billing.' || name ELSE name END"
        db = await asyncpg.connect(url)
        try:
            rows = await db.fetch(
                f"SELECT {with_schema} FROM ("  # noqa: S608 - no value of anybody's is in it
                "SELECT relname::text AS name, relnamespace AS place FROM pg_class UNION "
                "SELECT proname, pronamespace FROM pg_proc UNION "
                "SELECT typname, typnamespace FROM pg_type UNION "
                "SELECT attname, relnamespace FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid "
                "WHERE attname LIKE '%webhook%') AS names JOIN pg_namespace ON pg_namespace.oid = place"
            )
        finally:
            await db.close()
        return {name.removeprefix("billing.") if "webhook" in name else name for (name,) in rows}

    url = new_database()
    return run_apart(ask())


@pytest.mark.parametrize("document", [*DOCUMENTS, GUIDE], ids=named)
def test_every_table_and_metric_named_exists(document: Path, names_in_database: set[str]) -> None:
    metrics = generate.metrics()
    series = {f"{name}_{part}" for name in metrics for part in ("bucket", "count", "sum")}
    elsewhere = {
        "webhook_router",  # the name the guide gives the router
        "webhook_system",  # a key of /health
        "webhook_payloads_20260801",  # a day, for example
    }
    known = {*names_in_database, *metrics, *series, *elsewhere}
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![/\w.])webhook_[a-z0-9_]+\b(?!\.)", text)) <= known
    assert set(re.findall(r"(?<![\w./])billing\.[a-z_]+\b", text)) - {"billing.py"} <= known


def test_the_log_lines_that_operations_explains_exist_at_that_level() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    section = text[text.index("### Log lines") : text.index("## What can still go wrong")]
    explained = dict(re.findall(r"^\| `(\w+)` \| (debug|info|warning|error) \|", section, re.MULTILINE))
    assert explained and explained.items() <= generate.log_lines().items()
    loud = {name for name, level in generate.log_lines().items() if level == "error"}
    assert loud <= explained.keys(), "an error that nobody explains"


def test_every_metric_is_explained() -> None:
    section = OPERATIONS.read_text(encoding="utf-8").partition("### Metrics")[2].partition("### Alerts")[0]
    explained = {name for name, _ in re.findall(r"^\| `(\w+)(\{[^`]*\})?` \|", section, re.MULTILINE)}
    assert explained == generate.metrics().keys()


def test_every_table_is_explained_and_granted_to_the_role(names_in_database: set[str]) -> None:
    script = "".join(block.text for block in blocks(DEPLOY, "sql") if "kamiyo_app" in block.text)
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("## The tables")[2].partition("## The floors")[0]
    created = "".join(path.read_text(encoding="utf-8") for path in database.migration_files())
    tables = set(re.findall(r"CREATE (?:TABLE IF NOT EXISTS|OR REPLACE VIEW) (\S+)", created))
    assert tables and {table.removeprefix("billing.") for table in tables if "." not in table} <= names_in_database
    for table in tables:
        assert f"`{table}`" in section, f"{table} is not explained"
        assert re.search(rf"\b{table}\b", script) or table.startswith("billing."), f"{table} is not granted"


def test_the_floors_are_as_drawn() -> None:
    [drawing] = [block for block in blocks(ARCHITECTURE, "") if block.text.startswith("cli ")]
    drawn = [set(line.split("    ")[0].split()) for line in reversed(drawing.text.splitlines())]
    assert drawn == FLOORS


# ── Decisions ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("document", DECISIONS, ids=named)
def test_a_decision_is_a_page_with_all_its_parts(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"# {document.name[:4]} · ")
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [
        *("Context", "Decision", "Consequences", "Alternatives", "References")
    ]
    assert len(text.splitlines()) <= 60


def test_no_two_decisions_have_the_same_number() -> None:
    numbers = [int(path.name[:4]) for path in DECISIONS]
    assert len(set(numbers)) == len(numbers)


def test_every_dependency_has_its_reason() -> None:
    [decision] = [path for path in DECISIONS if path.stem.endswith("dependencies")]
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    packages = {line.split("[")[0].strip() for line in lines if line.strip() and not line.startswith("#")}
    unexplained = {name for name in packages if not re.search(rf"\b{name}\b", decision.read_text(encoding="utf-8"))}
    assert not unexplained
