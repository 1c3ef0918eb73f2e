"""Tokens with roles in a file, as those who call and those who hand them out see them."""

import pytest

from vla_dist.cli.main import main
from vla_dist.core.errors import ConfigError, Unauthorised
from vla_dist.serving.authorisation import TokenCheck, TokenFile, create_token, list_tokens, revoke_token


class Call:
    """Metadata of one call."""

    def __init__(self, token):
        self._token = token

    def invocation_metadata(self):
        return [("authorization", f"Bearer {self._token}")]


def test_an_expired_token_is_named_with_its_day_and_what_to_do(tmp_path, monkeypatch):
    path, clock = tmp_path / "tokens.json", [1_800_000_000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    token = create_token(path, name="arm-3", role="robot", robot_id="arm-3", days=90)
    kept = create_token(path, name="site", role="operator")
    check = TokenCheck(None, tokens=TokenFile(path))
    clock[0] += 90 * 86_400 - 1
    assert check.require(Call(token)).robot_id == "arm-3"
    clock[0] += 1
    with pytest.raises(Unauthorised, match=r"the token of arm-3 expired on 2027-04-15 08:00 UTC; make another"):
        check.require(Call(token))
    assert check.require(Call(kept)).name == "site"
    with pytest.raises(ConfigError, match="cannot be valid for -1 days"):
        create_token(path, name="arm-4", role="robot", robot_id="arm-4", days=-1)


def test_a_robot_has_two_tokens_while_one_takes_the_place_of_the_other(tmp_path):
    path = tmp_path / "tokens.json"
    old = create_token(path, name="arm-3/1", role="robot", robot_id="arm-3")
    new = create_token(path, name="arm-3/2", role="robot", robot_id="arm-3")
    check = TokenCheck(None, tokens=TokenFile(path))
    assert {check.require(Call(token)).robot_id for token in (old, new)} == {"arm-3"}
    revoke_token(path, "arm-3/1")
    check = TokenCheck(None, tokens=TokenFile(path))
    assert check.require(Call(new)).robot_id == "arm-3"
    with pytest.raises(Unauthorised, match="not this server's"):
        check.require(Call(old))


def test_files_of_before_there_were_expiries_are_read(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text('[{"name": "site", "role": "admin", "sha256": "%s", "robot_id": ""}]' % ("0" * 64))
    assert [entry.expires_at for entry in list_tokens(path)] == [0.0]


def test_the_command_makes_tokens_that_expire_and_lists_when(tmp_path, capsys):
    path = str(tmp_path / "tokens.json")
    main(["token", "create", path, "--name", "arm-3", "--robot-id", "arm-3", "--days", "30"])
    assert len(capsys.readouterr().out.strip()) > 40
    main(["token", "list", path])
    assert "UTC" in capsys.readouterr().out
