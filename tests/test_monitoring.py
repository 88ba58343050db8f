"""Dashboard and alert rules name only metrics and labels that the sidecar has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector
from test_tidy import ROOT

from engram.service._families import FAMILIES

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "engram.json").read_text())
RULES_FILE = ROOT / "deploy" / "prometheus" / "alerts.yml"
GROUPS = yaml.safe_load(RULES_FILE.read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

SCRAPED = {"job": (), "instance": ()}
"""Labels that Prometheus adds to everything."""
SELECTOR = re.compile(r"\b([a-z_]+)(?:\{([^}]*)\})?(?=[\[)\s}]|$)")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


def _known():
    """Labels, with their values where these are fixed, by the name of a sample."""
    samples = {"up": SCRAPED}
    for family in FAMILIES:
        labels = family.labels | SCRAPED
        if family.kind == "histogram":
            samples |= {f"{family.name}{end}": labels for end in ("_sum", "_count")}
            samples[f"{family.name}_bucket"] = labels | {"le": ()}
        else:
            samples[family.name] = labels
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for metric in registry.collect():
        samples |= {sample.name: SCRAPED for sample in metric.samples}
    return samples


KNOWN = _known()


def _selectors(expression):
    return [
        (name, MATCHER.findall(inside))
        for name, inside in SELECTOR.findall(expression)
        if name.startswith(("engram_", "process_")) or name == "up"
    ]


def _check(expression, legend=""):
    found = _selectors(expression)
    assert found, "asks for nothing"
    for name, matchers in found:
        assert name in KNOWN, name
        for label, operator, value in matchers:
            assert label in KNOWN[name], (name, label)
            fixed = KNOWN[name][label]
            if fixed and not value.startswith("$"):
                values = value.split("|") if operator in ("=~", "!~") else [value]
                assert set(values) <= set(fixed), (name, label, value)
    labels = {label for name, _ in found for label in KNOWN[name]}
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    for group in grouped:
        assert {label.strip() for label in group.split(",")} <= labels, expression
    # What is summed by some labels has no others.
    left = {label.strip() for group in grouped for label in group.split(",")} or labels
    said = re.findall(r"\{\{ *\$?(?:labels\.)?(\w+)", legend)
    assert {word for word in said if word != "value"} <= left, (legend, left)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_show_what_there_is(panel):
    assert panel["description"]
    for target in panel["targets"]:
        _check(target["expr"], target["legendFormat"])


def test_every_metric_is_on_the_dashboard():
    shown = {
        name
        for panel in PANELS
        for target in panel["targets"]
        for name, _ in _selectors(target["expr"])
    }
    asked = " ".join(str(each.get("query")) for each in DASHBOARD["templating"]["list"])
    for family in FAMILIES:
        ends = ("_bucket",) if family.kind == "histogram" else ("",)
        assert any(family.name + end in shown for end in ends) or family.name in asked, family.name


def test_panels_have_their_own_places():
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len(set(numbers)) == len(numbers)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in DASHBOARD["panels"])


def test_panels_ask_the_chosen_source_sidecars_and_tables():
    names = {each["name"] for each in DASHBOARD["templating"]["list"]}
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert "instance" in used
            assert used <= names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_there_is_and_say_what_to_do(rule):
    notes = rule["annotations"]
    _check(rule["expr"], notes["summary"] + notes["description"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert re.fullmatch(r"\d+[ms]", rule["for"])
    assert notes["summary"].endswith(".")
    assert len(notes["description"]) > 40
    page, _, anchor = notes["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M)
    assert rule["alert"] in headings


def test_every_runbook_paragraph_has_its_alert():
    text = (ROOT / "docs" / "operations.md").read_text()
    headings = re.findall(r"^#+ (Engram\w+)$", text, re.M)
    assert sorted(headings) == sorted(rule["alert"] for rule in RULES)


def test_the_check_sees_what_is_wrong():
    for wrong in (
        "engram_none == 1",
        'engram_table_state{state="sleeping"}',
        'engram_clients{table="t"}',
        "sum by (reason) (engram_clients)",
    ):
        with pytest.raises(AssertionError):
            _check(wrong)
    with pytest.raises(AssertionError):
        _check("sum by (table) (engram_tier_used_bytes)", "{{tier}}")


def test_prometheus_accepts_the_rules():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        ["promtool", "check", "rules", str(RULES_FILE)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
