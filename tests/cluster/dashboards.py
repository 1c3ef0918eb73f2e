"""Which metrics the dashboards and alerts of deploy/ are made of."""

import json
import re

import yaml
from lab import CHECKOUT

_NAME = re.compile(r"\bray_[a-zA-Z0-9_]+")


def expressions() -> list[str]:
    """Of all panels and alerts."""
    found = []
    for path in sorted((CHECKOUT / "deploy" / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found += [target["expr"] for target in panel["targets"]]
    for group in yaml.safe_load((CHECKOUT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return found


def metrics() -> set[str]:
    return {name for expression in expressions() for name in _NAME.findall(expression)}
