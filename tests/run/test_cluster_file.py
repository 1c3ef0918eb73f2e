"""Cluster files of the repository, and what is wrong with broken ones, found without a machine."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.run.cluster_check import check_cluster
from vla_dist.run.cluster_file import read_cluster_file
from vla_dist.run.kuberay_schema import has_kubernetes_schemas, manifest_trouble
from vla_dist.run.machine import Machine
from vla_dist.run.node import write_tokens
from vla_dist.run.presets import preset

ROOT = Path(__file__).parents[2]
FILES = [
    "ray_cluster.yaml",
    "cluster/gcp.yaml",
    "cluster/onprem.yaml",
    "cluster/kuberay/raycluster.yaml",
    "cluster/kuberay/rayservice.yaml",
]


@pytest.fixture
def home(tmp_path):
    write_tokens(tmp_path)
    return tmp_path


@pytest.fixture
def wrong(home, tmp_path):
    """What is wrong with one of the repository's files once ``edit`` was made."""

    def find(name, *edits, config=None):
        text = (ROOT / name).read_text()
        text = text.replace("203.0.113.", "198.51.100.").replace("fs-EDIT", "fs-1").replace(" EDIT:/vla", " store:/vla")
        text = text.replace("runs/EDIT", "runs/one")
        text = text.replace("project_id: EDIT", "project_id: mine").replace(
            "    ssh_private_key: ~/.ssh/id_ed25519\n", ""
        )
        for old, new in edits:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        findings = check_cluster(read_cluster_file(path), config or preset("demo"), home=home)
        return [one.text for one in findings if one.level == "wrong" and "`ray up` needs the package" not in one.text]

    return find


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_repository_are_in_order_once_edited(name, wrong):
    if "kuberay" in name and not has_kubernetes_schemas():
        pytest.skip("needs kubernetes-validate")
    assert wrong(name) == []


@pytest.mark.parametrize("name", FILES)
def test_what_the_example_leaves_open_is_named(name, home):
    if "onprem" in name:
        pytest.skip("it leaves no marks: every address is to be edited")
    findings = list(check_cluster(read_cluster_file(ROOT / name), preset("demo"), home=home))
    assert any(one.level == "wrong" and "still there: line" in one.text for one in findings)


BROKEN = [
    ("ray_cluster.yaml", ("max_workers: 28", "max_wokers: 28"), r"'max_wokers' was unexpected"),
    ("ray_cluster.yaml", ("InstanceType: g5", "InstanceTyp: g5"), "node_config of 'learner'.*InstanceTyp"),
    ("ray_cluster.yaml", ("    ~/.ray/auth_token: ~/.ray/auth_token\n", ""), "does not ship ~/.ray/auth_token"),
    ("ray_cluster.yaml", ("198.51.100.0/24", "0.0.0.0/0"), "9000-9000 is open to the whole internet"),
    ("ray_cluster.yaml", ("FromPort: 9000", "FromPort: 6379"), "6379-9000 is open beside the gateway's 9000"),
    (
        "ray_cluster.yaml",
        ("FromPort: 9000\n              ToPort: 9000", "FromPort: 1\n              ToPort: 1"),
        "no rule",
    ),
    ("ray_cluster.yaml", ("rollout: 16}", "rolout: 16}"), "node type 'rollout' has no role"),
    ("ray_cluster.yaml", ("CPU: 16, rollout: 16", "CPU: 16, serving: 1"), "is spot and takes serving"),
    ("ray_cluster.yaml", ("CPU: 0, gateway: 1", "CPU: 0"), "the head has no 'gateway' slot"),
    (
        "ray_cluster.yaml",
        ("vla-dist cluster start-head", "ray start --head"),
        "does not call 'vla-dist cluster start-head'",
    ),
    ("cluster/onprem.yaml", ("192.168.10.12:rollout=8", ""), "'192.168.10.12' has no role"),
    ("cluster/onprem.yaml", ("learner=1,serving=2", "serving=2"), "demo asks for 1 slots of 'learner'"),
    ("cluster/kuberay/raycluster.yaml", ("maxReplicas: 20", "maxReplica: 20"), "'maxReplica' was unexpected"),
    ("cluster/kuberay/raycluster.yaml", ("gcsFaultToleranceOptions:", "gcsFaultOptions:"), "gcsFaultToleranceOptions"),
    ("cluster/kuberay/raycluster.yaml", ("name: RAY_AUTH_MODE", "name: RAY_AUTH"), "come up open"),
]


@pytest.mark.parametrize(("name", "edit", "said"), BROKEN)
def test_broken_files_are_named_in_one_sentence(name, edit, said, wrong):
    if "InstanceTyp" in said or "max_wokers" in said:
        pytest.importorskip("boto3", reason="needs boto3")
    found = wrong(name, edit)
    assert any(re.search(said, text) for text in found), found


def test_a_preset_that_asks_for_more_than_the_file_has_is_named(wrong):
    config = preset("demo")
    learner = dataclasses.replace(config.learner, use_gpu=True, num_workers=8)
    (found, *_) = wrong("ray_cluster.yaml", config=dataclasses.replace(config, learner=learner))
    assert "demo asks for 8 slots of 'learner' at once (8 learner ranks), the file has at most 4" in found


def test_tokens_that_others_can_read_are_named(wrong, home):
    (home / ".ray/auth_token").chmod(0o644)
    assert any("can be read by others" in text for text in wrong("cluster/onprem.yaml"))
    (home / ".ray/auth_token").unlink()
    assert any("auth_token is missing or empty" in text for text in wrong("cluster/onprem.yaml"))
    made = write_tokens(home)
    assert [path.name for path in made] == ["auth_token"]
    assert made[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "is not YAML"), ("a: 1", "is no cluster file"), ("[1]", "must hold maps"), ("provider: 3", "understood")],
)
def test_what_is_no_cluster_file_is_refused(text, said, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_cluster_file(path)
    with pytest.raises(NotFound, match="is not there"):
        read_cluster_file(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["robot", "10.0.0.1:rollout", "10.0.0.1:arms=1", "10.0.0.1:rollout=-1"])
def test_a_line_of_the_table_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match="host "):
        Machine.parse(text)


def test_hosts_of_the_table():
    host = Machine.parse("10.0.0.1:learner=1,serving=2,gpu=2,cpu=8")
    assert (host.address, dict(host.resources), host.cpus, host.gpus) == (
        "10.0.0.1",
        {"learner": 1, "serving": 2},
        8,
        2,
    )


def test_manifests_of_kuberay_are_known_to_kubernetes():
    if not has_kubernetes_schemas():
        pytest.skip("needs kubernetes-validate")
    for path in sorted((ROOT / "cluster/kuberay").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            assert list(manifest_trouble(manifest)) == []
    (head,) = [m for m in yaml.safe_load_all((ROOT / FILES[3]).read_text()) if m["kind"] == "RayCluster"]
    head["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    assert any("imag" in trouble for trouble in manifest_trouble(head))
