"""docs/operations.md is what somebody reads at night: what it names must be there, and what may ring must be in it."""

import re
from pathlib import Path

import pytest
import yaml

from vla_dist.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
_COMMAND = re.compile(r"vla-dist ((?:cluster|replay|registry|token) [a-z-]+|[a-z-]+)([^`'|#\n]*)")
_OPTION = re.compile(r"(?<!\S)--[a-z][a-z.-]+")


def commands():
    """Verb -> options that the page gives it."""
    found = {}
    for verb, rest in _COMMAND.findall(PAGE):
        found.setdefault(verb, set()).update(_OPTION.findall(rest))
    return found


@pytest.mark.parametrize(("verb", "options"), sorted(commands().items()))
def test_commands_of_the_page_have_their_options(verb, options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [*verb.split(), *(["demo"] if verb == "run" else []), "--help"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    known = set(_OPTION.findall(capsys.readouterr().out)) | ({"--resume"} if verb == "run" else set())
    assert options <= known


def test_every_alert_has_its_line():
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    assert len(rules) > 5
    listed = PAGE.partition("## What each alert means")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| ([A-Z]\w+) \|", listed, re.MULTILINE)) == {rule["alert"] for rule in rules}


def test_files_that_the_page_names_are_there():
    for name in re.findall(r"`([a-z_/]+\.(?:md|yml|yaml|sh|service|json|cfg))`", PAGE):
        if not name.startswith(("audit", "shadow")):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "docs")), name
