"""Random histories of everything a buffer can be asked, beside a model of it in plain Python."""

import pytest
from buffer_machine import BufferMachine, RestartedBufferMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from vla_dist.replay.server import EmbeddedServer


@pytest.fixture
def run_histories(monkeypatch, tmp_path):
    """Runs a machine on a server of its own, with pages and compactions so small that histories meet them."""
    monkeypatch.setattr("vla_dist.replay.following._PAGE", 3)
    monkeypatch.setattr("vla_dist.replay.episodes._PAGE", 2)
    monkeypatch.setattr("vla_dist.replay.index._LEAST_COMPACTION", 8)

    def run(machine: type[BufferMachine], *, histories: int, steps: int) -> None:
        machine.server = EmbeddedServer(tmp_path / "server")
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=histories,
                    stateful_step_count=steps,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            machine.server.close()

    return run


@pytest.mark.timeout(300)
def test_histories_match_the_model(run_histories):
    run_histories(BufferMachine, histories=60, steps=50)


@pytest.mark.timeout(300)
def test_histories_with_killed_servers_match_the_model(run_histories):
    run_histories(RestartedBufferMachine, histories=6, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_long_histories_match_the_model(run_histories):
    run_histories(BufferMachine, histories=400, steps=120)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_histories_with_killed_servers_match_the_model(run_histories):
    run_histories(RestartedBufferMachine, histories=60, steps=60)
