"""A canary's life by the command line: begun, refused, promoted on evidence, taken back; and tokens."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_dist.cli.main import main
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import fake_artifact


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with EmbeddedServer(tmp_path / "redis") as server:
        registry = RedisPolicyRegistry(server.url, RedisBlobs(server.url))
        for bias in (0.1, 0.2, 0.3):
            registry.publish(fake_artifact(make_spec(), bias=bias))
        registry.set_channel("demo", "stable", 1)
        yield server.url
        registry.close()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 1
    return capsys.readouterr().err


def test_a_canary_from_its_start_to_its_promotion(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no canary of it runs" in refused(capsys, "promote", "demo@2", "--redis-url", url)
    main(["promote", "demo@2", "--to", "canary", "--share", "0.25", "--min-episodes", "20", "--redis-url", url])
    assert "25% of the robots" in capsys.readouterr().out
    assert "0 of 20 episodes" in refused(capsys, "promote", "demo@2", "--redis-url", url)
    canaries = RedisCanaries(url)
    for index in range(60):
        for version in (1, 2):
            canaries.record("demo", version, f"e{index}", success=version == 2 or index % 2 == 0)
    main(["channels", "--redis-url", url])
    out = capsys.readouterr().out
    assert "60/60" in out
    assert "30/60" in out
    main(["promote", "demo@2", "--redis-url", url])
    assert "no worse by more than" in capsys.readouterr().out
    main(["channels", "demo", "--json", "--redis-url", url])
    found = json.loads(capsys.readouterr().out)
    assert found["policies"][0]["channels"]["stable"] == 2
    assert [entry["event"] for entry in found["audit"]] == [
        "refused",
        "canary",
        "refused",
        "promoted",
        "stable",
    ]
    main(["rollback", "demo", "--redis-url", url])
    assert "from 2 back to 1" in capsys.readouterr().out
    canaries.close()


def test_a_canary_is_ended_by_hand_and_force_says_why(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["promote", "demo@3", "--to", "canary", "--redis-url", url])
    main(["rollback", "demo", "--reason", "smoke", "--redis-url", url])
    assert "the canary demo@3 is ended" in capsys.readouterr().out
    main(["promote", "demo@3", "--force", "the fleet stands still", "--redis-url", url])
    main(["promote", "demo@2", "--to", "shadow", "--redis-url", url])
    capsys.readouterr()
    main(["channels", "--json", "--redis-url", url])
    found = json.loads(capsys.readouterr().out)
    assert found["policies"][0]["channels"] == {"canary": 1, "shadow": 2, "stable": 3}
    assert any(entry.get("reason") == "forced: the fleet stands still" for entry in found["audit"])
    assert "incumbent itself" in refused(capsys, "promote", "demo@3", "--to", "canary", "--redis-url", url)


def test_tokens_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "tokens.json")
    main(["token", "create", file, "--name", "arm-3", "--robot-id", "arm-3"])
    token = capsys.readouterr().out.strip()
    assert len(token) > 30
    assert token not in Path(file).read_text()
    assert Path(file).stat().st_mode & 0o077 == 0
    main(["token", "list", file])
    assert "arm-3" in capsys.readouterr().out
    assert "names its robot" in refused(capsys, "token", "create", file, "--name", "x")
    main(["token", "revoke", file, "--name", "arm-3"])
    assert "no token named 'arm-3'" in refused(capsys, "token", "revoke", file, "--name", "arm-3")
