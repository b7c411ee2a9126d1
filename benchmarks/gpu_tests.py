"""A pytest plugin that writes each test's result at once and, started again, runs what has not passed yet.

    pytest -p gpu_tests --results tests.jsonl -m gpu

Each line of the file is one test: name, outcome (``started``, ``passed``, ``failed`` or ``skipped``), seconds, commit,
and the error. Tests whose last outcome is ``failed`` come first, then those that never ran, then those in which a run
was cut off; the others are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_summary import last_results

DONE = ("passed", "skipped")
ORDER = {"failed": 0, None: 1, "started": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    parser.addoption("--results", type=Path, required=True, help="file of results, one test a line")
    parser.addoption("--commit", default="unknown", help="written beside each result")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Failed tests first, then those that never ran; those that passed are deselected."""
    before = {name: one["outcome"] for name, one in last_results(config.getoption("--results")).items()}
    done = [item for item in items if before.get(item.nodeid) in DONE]
    left = [item for item in items if before.get(item.nodeid) not in DONE]
    items[:] = sorted(left, key=lambda item: ORDER[before.get(item.nodeid)])
    config.hook.pytest_deselected(items=done)


class Results:
    """Collects the phases of each test and writes one line when it ends."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        self.now: dict[str, Any] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Begins a test."""
        self.now = {"test": nodeid, "outcome": "passed", "seconds": 0.0, "commit": self.commit}
        self.write(self.now | {"outcome": "started"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds set-up, call or tear-down."""
        self.now["seconds"] = round(self.now["seconds"] + report.duration, 2)
        if report.outcome != "passed" and self.now["outcome"] != "failed":
            self.now |= {"outcome": report.outcome, "error": report.longreprtext[-2000:]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Writes the result."""
        self.write(self.now)

    def write(self, result: dict[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Opens the file."""
    path = config.getoption("--results")
    path.parent.mkdir(parents=True, exist_ok=True)
    config.pluginmanager.register(Results(path, config.getoption("--commit")), "gpu-results")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing left to run is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and last_results(session.config.getoption("--results")):
        session.exitstatus = pytest.ExitCode.OK
