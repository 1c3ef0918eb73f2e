"""HAProxy processes that outlive the Ray that started them."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from vla_dist.run.gateways import end_gateways, gateways


@pytest.fixture
def start(tmp_path):
    """A process named haproxy, with a configuration in a folder; by itself, or as the child of one of Ray's."""
    children = []
    # A script's process is named after its file.
    for name, line in (("haproxy", "sleep 60 & wait"), ("ray::HAProxyManager", '"$@" & wait')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def run(folder, *, is_looked_after=False):
        parent = [tmp_path / "ray::HAProxyManager"] if is_looked_after else []
        before = len(gateways(folder))
        children.append(
            subprocess.Popen([*parent, tmp_path / "haproxy", "-f", f"{folder}/haproxy.cfg"], start_new_session=True)
        )
        end = time.monotonic() + 20
        while len(gateways(folder)) == before:
            assert time.monotonic() < end
            time.sleep(0.02)
        return gateways(folder)[-1].pid

    yield run
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_a_gateway_whose_ray_was_killed_no_longer_holds_its_port(start, tmp_path):
    start(tmp_path / "other")
    kept, orphan = start(tmp_path / "mine", is_looked_after=True), start(tmp_path / "mine")
    assert end_gateways(tmp_path / "mine", only_orphans=True) == [orphan]
    assert [one.pid for one in gateways(tmp_path / "mine")] == [kept]
    assert end_gateways(tmp_path / "mine") == [kept]
    assert len(gateways(tmp_path / "other")) == 1
