"""Who may call the policy service of a run, refused at its start where it cannot work."""

import dataclasses

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.run.access import access_of, require_access
from vla_dist.run.presets import preset
from vla_dist.serving.authorisation import create_token


def with_serving(num_robots, **changes):
    config = preset("babyai")
    fleet = dataclasses.replace(config.fleet, num_robots=num_robots)
    return dataclasses.replace(config, fleet=fleet, serving=dataclasses.replace(config.serving, **changes))


def test_replicas_are_given_token_file_and_audit(tmp_path):
    access = access_of(with_serving(0, tokens=str(tmp_path / "tokens.json")).serving, tmp_path)
    assert access.token is None
    assert (access.tokens_file, access.audit) == (tmp_path / "tokens.json", tmp_path / "audit.jsonl")
    assert access_of(with_serving(0, token="secret").serving, tmp_path).tokens_file is None


def test_a_token_file_that_is_none_and_robots_without_a_token_are_refused(tmp_path):
    path = tmp_path / "tokens.json"
    with pytest.raises(ConfigError, match="is not a token file"):
        require_access(with_serving(0, tokens=str(path)))
    create_token(path, name="site", role="operator")
    require_access(with_serving(0, tokens=str(path)))
    require_access(with_serving(4, tokens=str(path), token="secret"))
    with pytest.raises(ConfigError, match="the 4 simulated ones of this run have none"):
        require_access(with_serving(4, tokens=str(path)))
