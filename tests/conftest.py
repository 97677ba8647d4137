"""Prints what the tests in the folders `attacks` have tried, one line per attack, before pytest's own summary."""

import inspect
from collections import defaultdict
from typing import Any

import pytest

RESULTS: dict[str, list[str]] = defaultdict(list)  # what is attacked and how it is refused -> outcomes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if "attacks" in item.path.parts and (report.when == "call" or report.failed):
        function = getattr(item, "function", None)
        told = inspect.getdoc(function) or item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
        RESULTS[" ".join(told.split())].append(report.outcome)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not RESULTS:
        return
    terminalreporter.section("attacks and how they are refused")
    for told, outcomes in RESULTS.items():
        held = sum(outcome == "passed" for outcome in outcomes)
        verdict = "refused" if held == len(outcomes) else "NOT REFUSED"
        terminalreporter.write_line(f"{verdict:<12} {held}/{len(outcomes)}  {told}")
