"""A campaign's file is read strictly, and says what is wrong in one sentence."""

from pathlib import Path

import pytest

from vla_dist.collection.campaign import load_campaign
from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.testing.fakes import make_spec

GOOD = """
name: drawers
contract: arm.json
groups: {left: [arm-1, arm-2]}
quotas:
  - {task: open, episodes: 3, source: human, robots: [left, "spare-*"]}
  - {task: close, episodes: 2, success: null, policy: demo@stable, robots: left}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "campaign.yaml"
    path.write_text(text)
    return path


def test_a_campaign_is_read(tmp_path: Path) -> None:
    campaign = load_campaign(write(tmp_path, GOOD))
    first, second = campaign.quotas
    assert campaign.tasks == ("open", "close")
    assert (first.episodes, first.success, second.success, second.robots) == (3, True, None, ("left",))
    allowed = [robot for robot in ("arm-1", "arm-3", "spare-9") if campaign.allows(first, robot)]
    assert allowed == ["arm-1", "spare-9"]
    (tmp_path / "arm.json").write_text(make_spec().to_json())
    assert campaign.spec_from_contract(tmp_path).differences(make_spec()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name: drawers", "name: 'no spaces allowed'"), "1 to 48 letters"),
        (("episodes: 3", "episodes: many"), r"quotas\[0\].episodes is 'many', expected int"),
        (("episodes: 3", "episodes: 0"), "must be at least 1"),
        (("episodes: 3", "episods: 3"), "did you mean 'episodes'"),
        (("source: human", "source: robot"), "must be one of expert, policy, human"),
        (("contract: arm.json", "contract: arm.json\nenvironment: metaworld"), "exactly one of them"),
        (("contract: arm.json", "contract: arm.json\nsimulation: {num_robots: 2}"), "needs environment"),
        ((", policy: demo@stable", ""), "must be written name@channel"),
        (
            ("contract: arm.json", "environment: metaworld\nsimulation: {num_robots: 2}"),
            "by demo@stable; say .*policy_server",
        ),
        (("contract: arm.json", "contract: arm.json\nhost: 0.0.0.0"), "set tokens or token as well"),
        (
            ("contract: arm.json", "contract: arm.json\nhost: 0.0.0.0\ntoken: x\nidentity_from_front: true"),
            "believes whoever reaches the port",
        ),
        (
            ("contract: arm.json", "environment: metaworld\ntokens: t.json\nsimulation: {num_robots: 2}"),
            "no tokens of their own; set token as well",
        ),
        (("left: [arm-1, arm-2]", "left: []"), "group 'left' has no robot"),
        (("quotas:", "quotas: []\nother:"), "has no setting 'other'"),
        (("name: drawers", "name: ["), "is not YAML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_campaign(write(tmp_path, GOOD.replace(*change)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no campaign at"):
        load_campaign(tmp_path / "none.yaml")
