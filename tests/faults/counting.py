"""Counts what the tests of this folder tried, and what came of it, for the table in docs/faults.md.

python -m pytest -m slow tests/faults

With HF_SARA_FAULTS_PAGE=docs/faults.md, the table in that page is written anew.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

# What must never happen. Each has a column.
OUTCOMES = ("lost", "wrong", "executed", "traces", "secret bytes")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


class Tried:
    """Counts the faults of one kind that a test made."""

    def __init__(self, record):
        self.record = record

    def __call__(self, what: str, count: int = 1, **outcomes: int) -> None:
        """
        Note that faults were tried.

        Args:
            what (`str`): The kind of fault, as the table names it.
            count (`int`): How many there were.
            outcomes (`int`): How many of them ended in one of `OUTCOMES`; a blank in its name is `_` here.
        """
        known = {name.replace(" ", "_") for name in OUTCOMES}
        assert set(outcomes) <= known
        self.record("tried", [what, count, outcomes])
        assert not any(outcomes.values()), f"{what}: {outcomes}"


@pytest.fixture
def tried(record_property) -> Tried:
    """Counts faults, see `Tried`. The test fails if one of them ended in a way that it must not."""
    return Tried(record_property)


def table(reports) -> str:
    """The counts of all tests as a table in Markdown."""
    counts: dict[str, Counter] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "tried":
                what, count, outcomes = value
                counts.setdefault(what, Counter()).update({"tried": count, **outcomes})
    rows = [
        f"| {what} | {found['tried']:,} | "
        + " | ".join(f"{found[name.replace(' ', '_')]:,}" for name in OUTCOMES)
        + " |"
        for what, found in sorted(counts.items())
    ]
    head = f"| what was tried | times | {' | '.join(OUTCOMES)} |\n|---|---:|{'---:|' * len(OUTCOMES)}"
    return "\n".join([head, *rows])


def pytest_terminal_summary(terminalreporter):
    found = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    reports = [report for report in found if any(name == "tried" for name, _ in report.user_properties)]
    if not reports:
        return
    text = table(reports)
    terminalreporter.section("what was tried")
    terminalreporter.write_line(text)
    page = os.environ.get("HF_SARA_FAULTS_PAGE")
    if page:
        before, rest = Path(page).read_text(encoding="utf-8").split(BEGIN)
        content = f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
        Path(page).write_text(content, encoding="utf-8")
