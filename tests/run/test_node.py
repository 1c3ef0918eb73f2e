"""What `ray start` is given on the nodes of a cluster, and what it inherits."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing
from vla_dist.run.head_store import HeadStoreConfig, StoreAddresses
from vla_dist.run.machine import Machine
from vla_dist.run.node import (
    head_command,
    head_environment,
    node_environment,
    start_ray,
    worker_command,
    write_tokens,
)
from vla_dist.run.placement import LIMITS_VARIABLE

STORE = StoreAddresses(
    pid=1, replay_url="redis://client:one@10.0.0.1:6380/0", ray_url="redis://client:two@127.0.0.1:6381/0"
)
HOSTS = [Machine.parse("10.0.0.2:rollout=4,cpu=8"), Machine.parse("10.0.0.3:learner=1,serving=2,gpu=1")]


def test_a_head_remembers_itself_in_its_own_redis_and_offers_a_gateway(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES", raising=False)
    config = HeadStoreConfig(folder=tmp_path, host="10.0.0.1")
    command = head_command(config, STORE, home=tmp_path)
    assert {"--redis-password=two", "--node-ip-address=10.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=0"} <= set(
        command
    )
    assert '--resources={"gateway": 1}' in command
    assert not any("autoscaling" in word for word in command)
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: local, head_ip: 10.0.0.1}")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "{}")
    command = head_command(config, STORE, home=tmp_path)
    assert f"--autoscaling-config={tmp_path}/ray_bootstrap_config.yaml" in command
    assert not any("--resources" in word for word in command)


def test_a_heads_environment_has_the_stores_and_the_tokens(tmp_path):
    with pytest.raises(NotFound, match="run 'vla-dist cluster tokens'"):
        node_environment(tmp_path)
    write_tokens(tmp_path)
    environment = head_environment(STORE, cluster="mine", home=tmp_path)
    assert environment["VLA_DIST_REDIS_URL"] == STORE.replay_url
    assert environment["RAY_REDIS_ADDRESS"] == "127.0.0.1:6381"
    assert environment["RAY_external_storage_namespace"] == "mine"
    assert environment["VLA_DIST_FLEET_TOKEN"] == (tmp_path / ".vla-dist/fleet_token").read_text()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_enable_autoscaler_v2" not in environment
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: local, head_ip: 10.0.0.1}")
    assert head_environment(STORE, cluster="mine", home=tmp_path)["RAY_enable_autoscaler_v2"] == "0"


def test_a_head_knows_what_its_autoscaler_may_add(tmp_path):
    write_tokens(tmp_path)
    shutil.copy(Path(__file__).parents[2] / "ray_cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
    limits = json.loads(head_environment(STORE, cluster="mine", home=tmp_path)[LIMITS_VARIABLE])
    assert limits == {"rollout": 320, "learner": 4, "serving": 16, "gateway": 1, "CPU": 368, "GPU": 8}


def test_a_worker_finds_itself_in_the_table():
    command = worker_command("10.0.0.1", HOSTS, ["172.17.0.1", "10.0.0.3"])
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.3", "--num-gpus=1"} <= set(command)
    (resources,) = [word for word in command if word.startswith("--resources=")]
    assert json.loads(resources.partition("=")[2]) == {"learner": 1, "serving": 2}
    with pytest.raises(ConfigError, match=r"has the addresses 10\.0\.0\.9, none of them in the table \(10\.0\.0\.2"):
        worker_command("10.0.0.1", HOSTS, ["10.0.0.9"])


def test_a_clouds_worker_takes_what_the_cluster_file_says():
    command = worker_command("127.0.0.1", [], [])
    assert "--node-ip-address=127.0.0.1" in command
    assert not any("resources" in word for word in command)


_REFUSAL = """Traceback (most recent call last):
RuntimeError: Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.11.7
This process on node 10.0.0.3 was started with:
    Ray: 2.60.0
    Python: 3.12.1
"""


def test_a_node_with_another_python_is_refused_in_one_sentence(tmp_path, capfd):
    program = "import os, sys; open(sys.argv[1], 'a').write('x'); sys.exit(os.environ['SAID'])"
    command = [sys.executable, "-c", program, str(tmp_path / "calls")]
    with pytest.raises(
        ConfigError, match=r"this machine has Python 3\.12\.1 and Ray 2\.60\.0, the head has Python 3\.11"
    ):
        start_ray(command, {"SAID": _REFUSAL})
    assert (tmp_path / "calls").read_text() == "x"
    assert capfd.readouterr() == ("", "")


def test_a_ray_that_does_not_start_is_tried_again_and_says_why(tmp_path, capfd, monkeypatch):
    (tmp_path / "ray").write_text("#!/bin/sh\n")
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ResourceMissing, match="3 attempts"):
        start_ray(["sh", "-c", "echo the raylet is busy; exit 1"], {})
    assert capfd.readouterr().out == "the raylet is busy\n" * 3
