import shutil
from pathlib import Path

import pytest
import redis

from vla_dist.cli.main import main
from vla_dist.replay.server import EmbeddedServer

ROOT = Path(__file__).parents[2]


def exit_of(*words):
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


def test_check_says_what_is_wrong_and_leaves_with_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "cluster.yaml"
    shutil.copy(ROOT / "cluster/onprem.yaml", path)
    assert exit_of("cluster", "check", str(path)) == 1
    assert "run 'vla-dist cluster tokens'" in capsys.readouterr().out
    main(["cluster", "tokens"])
    path.write_text(path.read_text().replace("    ssh_private_key: ~/.ssh/id_ed25519\n", ""))
    main(["cluster", "check", str(path)])
    assert "ready to launch" in capsys.readouterr().out
    main(["cluster", "tokens"])
    assert "both tokens are there already" in capsys.readouterr().out
    tokens = [tmp_path / name for name in (".ray/auth_token", ".vla-dist/fleet_token")]
    old = [path.read_text() for path in tokens]
    main(["cluster", "tokens", "--renew"])
    assert capsys.readouterr().out.splitlines() == [f"made {path}" for path in tokens]
    assert not set(old) & {path.read_text() for path in tokens}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tokens)


def test_a_store_is_backed_up_and_restored(tmp_path, capsys):
    with EmbeddedServer(tmp_path / "redis") as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "kept")
        main(["cluster", "backup", str(tmp_path / "copy"), "--store", str(server.directory)])
        assert f"MiB of {server.directory} are in {tmp_path / 'copy'}" in capsys.readouterr().out
    main(["cluster", "restore", str(tmp_path / "copy"), "--store", str(tmp_path / "other")])
    assert f"{tmp_path / 'other'} has what {server.directory} had on 2" in capsys.readouterr().out
    with EmbeddedServer(tmp_path / "other") as server, redis.Redis.from_url(server.url) as client:
        assert client.get("key") == b"kept"
    assert exit_of("cluster", "restore", str(tmp_path / "copy"), "--store", str(tmp_path / "other")) == 1
    assert "has data already" in capsys.readouterr().err


def test_environment_is_what_a_shell_can_read(capsys):
    main(["cluster", "environment"])
    lines = capsys.readouterr().out.splitlines()
    assert "export RAY_SERVE_ENABLE_HA_PROXY=1" in lines
    assert all(line.startswith(("export RAY_", "export VLA_DIST_")) for line in lines)


def test_a_wrong_verb_names_the_nearest(capsys):
    assert exit_of("cluster", "chek", "x") == 1
    assert "did you mean 'vla-dist cluster check'" in capsys.readouterr().err


def test_plan_names_the_bottleneck_and_its_source(capsys):
    main(["plan", "demo", "--cluster", str(ROOT / "ray_cluster.yaml"), "--rollout-workers", "40"])
    said = capsys.readouterr().out
    assert "bottleneck: learner (cpu); more --learner.num-workers" in said
    assert "USD an hour" in said
    assert "from: vla-dist bench parts demo" in said
    assert exit_of("plan", "rt1-tiny", "--cluster", str(ROOT / "ray_cluster.yaml")) == 1
    assert "preset 'rt1-tiny' was not measured" in capsys.readouterr().err
