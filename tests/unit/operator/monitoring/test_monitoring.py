"""The alerts, the dashboard and the page on monitoring name only what exists, and Prometheus's own tool accepts them."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.metrics.resources import STAGES
from graft.status import REASONS
from testbed import packages
from testbed.shell import REPOSITORY
from worlds.monitoring.exposed import PARTS, exposed, samples

HERE = Path(__file__).parent
MONITORING = REPOSITORY / "charts/graft/monitoring"
RULES = MONITORING / "rules.yaml"
PAGE = REPOSITORY / "docs/monitoring.md"
TARGET = {"namespace", "pod", "instance", "job", "container", "service"}  # labels that Prometheus adds to each target
KNOWN = {name: labels for part in PARTS for name, labels in samples(part).items()}
KNOWN["graft_build_info"] = frozenset({"component", "version"})
# Values that a query may ask for.
VALUES: dict[str, set[str]] = {
    "stage": {*STAGES, "download", "load", "all"},
    "kind": set(REASONS),
    "type": {type_ for kind in REASONS.values() for type_ in kind},
    "reason": {reason for kind in REASONS.values() for found in kind.values() for reason in found},
    "outcome": {"succeeded", "failed", "rejected", "done", "error", "conflict"},
}
SELECTOR = re.compile(r"([a-z_]\w*)\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")
WORDS = {
    "sum", "max", "rate", "increase", "histogram_quantile", "vector", "by", "on", "and", "or", "m", "h", "d",
}  # fmt: skip


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> Iterator[tuple[str, str]]:
    """Yield title and query of each line of the dashboard."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def labels_of(query: str) -> set[str]:
    """Return the labels of the metrics in a query. Fail if a metric, a label or a value in it does not exist."""
    labels: set[str] = set()
    grouped = {label.strip() for found in GROUPING.findall(query) for label in found.split(",")}
    plain = GROUPING.sub("", query)
    for name, matchers in SELECTOR.findall(plain):
        if name in WORDS:
            continue
        assert name in KNOWN, f"no metric {name}: {query}"
        labels |= KNOWN[name] | TARGET
        for label, _, value in MATCHER.findall(matchers):
            assert label in KNOWN[name] | TARGET, f"{name} has no label {label}: {query}"
            for one in value.split("|") if label in VALUES and "$" not in value else ():
                assert one in VALUES[label], f"{label} is never {one}: {query}"
    assert labels, f"no metric in {query}"
    assert grouped <= labels, f"{grouped - labels} are labels of no metric in {query}"
    return grouped or labels


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_uses_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    labels = labels_of(rule["expr"])
    text = json.dumps(rule["annotations"])
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels
    assert f"| `{rule['alert']}` |" in PAGE.read_text()
    assert set(re.findall(r"\bgraft_\w+", text)) <= KNOWN.keys()


def test_the_dashboard_uses_metrics_and_labels_that_exist() -> None:
    found = json.loads((MONITORING / "dashboard.json").read_text())
    for panel in found["panels"]:
        for target in panel.get("targets", []):
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= labels_of(target["expr"]), panel["title"]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    (variable,) = re.findall(r"label_values\((\w+), (\w+)\)", json.dumps(found["templating"]))
    assert variable[1] in KNOWN[variable[0]]


@pytest.mark.parametrize(
    "query", ["graft_jbs", 'graft_jobs{stage="Trainig"}', "sum by (tenant) (graft_jobs)", 'graft_jobs{a="b"}']
)
def test_the_check_finds_what_does_not_exist(query: str) -> None:
    with pytest.raises(AssertionError):
        labels_of(query)


def documented() -> dict[str, dict[str, set[str]]]:
    """Return the metrics in the page's tables: part -> name -> labels."""
    found: dict[str, dict[str, set[str]]] = {}
    part = ""
    for line in PAGE.read_text().splitlines():
        if heading := re.match(r"### The (operator|gateway|agent)s?\b", line):
            part = heading[1]
        elif row := re.match(r"\| `((?:graft|process)_\w+)` \| ([^|]*)\|", line):
            found.setdefault(part, {})[row[1]] = set(re.findall(r"`(\w+)`", row[2]))
    return found


@pytest.mark.parametrize("part", PARTS)
def test_the_page_lists_exactly_the_metrics_that_exist(part: str) -> None:
    there = {name: set(labels) for name, labels in exposed(part).items() if not name.startswith("process_")}
    assert documented()[part] == there


@pytest.fixture(scope="module")
def promtool() -> str:
    packages.install({"promtool": "prometheus"})
    return "promtool"


def check(promtool: str, *arguments: str) -> None:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_alerts_and_the_queries_of_the_dashboard(promtool: str, tmp_path: Path) -> None:
    check(promtool, "check", "rules", str(RULES))
    queries = [
        {"record": f"panel:{number}", "expr": query.replace("$tenant", ".*")}
        for number, (_, query) in enumerate(panels())
    ]
    rules = tmp_path / "queries.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": queries}]}))
    check(promtool, "check", "rules", str(rules))


def test_the_alerts_fire_when_they_should_and_only_then(promtool: str, tmp_path: Path) -> None:
    bare = yaml.safe_load(RULES.read_text())  # promtool compares annotations, too
    for rule in (rule for group in bare["groups"] for rule in group["rules"]):
        del rule["annotations"]
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(bare))
    tests = yaml.safe_load((HERE / "alerts.yaml").read_text()) | {"rule_files": [str(rules)]}
    tested = {item["alertname"] for test in tests["tests"] for item in test["alert_rule_test"] if item["exp_alerts"]}
    assert tested == {rule["alert"] for rule in alerts()}
    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump(tests))
    check(promtool, "test", "rules", str(file))
