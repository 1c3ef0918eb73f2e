import shutil
from pathlib import Path

import pytest

from vla_dist.cli.main import main

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
