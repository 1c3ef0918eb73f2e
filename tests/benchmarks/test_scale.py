"""The simulation of `vla-dist bench scale` against what can be worked out by hand."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


COSTS = {
    "rollout_s": 1e-3,
    "rollout_steps": 50.0,
    "insert_s": 10e-6,
    "follow_s": 5e-6,
    "read_s": 1e-6,
    "sample_s": 200e-6,
    "load_s": 1e-3,
    "update_s": 0.05,
    "num_parameters": 1_000_000,
    "gateway_s": 50e-6,
    "loop_s": 0.5e-3,
    "batch_s": 2e-3,
    "row_s": 0.25e-3,
    "client_s": 0.2e-3,
    "ingest_s": 20e-6,
}
FACTS = {"batch_size": 64, "samples_per_insert": 4.0, "segment_steps": 32, "buffer_windows": 2_000.0}


def outcome(seconds=8.0, **layout):
    from scale_parts.system import Costs, Layout, simulate

    return simulate(Costs(**COSTS), Layout(**layout), warm_up_s=3.0, seconds=seconds)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_server_keeps_who_comes_at_random_waiting_as_long_as_queueing_theory_says(load):
    """M/D/1: the mean wait is load / (2 (1 - load)) services (Pollaczek 1930, Khinchine 1932)."""
    from scale_parts.kernel import Host, Server, Simulation, ask, sleep

    simulation, server, dice, waits = Simulation(), Server(Host(1)), random.Random(0), []

    def arrivals():
        while True:
            yield sleep(dice.expovariate(load))
            simulation.start(customer())

    def customer():
        began = simulation.now
        yield ask(server, 1.0)
        waits.append(simulation.now - began - 1.0)

    simulation.start(arrivals())
    simulation.run(30_000)
    assert sum(waits) / len(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    assert server.busy_s / 30_000 == pytest.approx(load, rel=0.03)


def test_cores_are_shared_alike_by_all_that_want_them():
    from scale_parts.kernel import Host, Simulation, sleep, work

    simulation, host, ended = Simulation(), Host(2), {}

    def task(name, begins, seconds):
        yield sleep(begins)
        yield work(host, seconds)
        ended[name] = simulation.now

    for name, begins, seconds in (("a", 0, 2), ("b", 0, 2), ("c", 0, 2), ("late", 3, 1)):
        simulation.start(task(name, begins, seconds))
    simulation.run(100)
    # Three tasks on two cores take 3 s; a core of its own makes the late one as fast as it is.
    assert ended == pytest.approx({"a": 3, "b": 3, "c": 3, "late": 4})
    assert host.busy_s == pytest.approx(7)


def test_who_waits_for_a_signal_or_for_several_things_goes_on_then():
    from scale_parts.kernel import Host, Server, Signal, Simulation, ask, gather, sleep, until

    simulation, signal, moments = Simulation(), Signal(), []
    servers = [Server(Host(1)), Server(Host(1))]

    def waiter():
        yield until(signal)
        moments.append(simulation.now)
        yield gather(ask(servers[0], 1.0), ask(servers[1], 3.0))
        moments.append(simulation.now)

    def firer():
        yield sleep(2.0)
        signal.fire(simulation)

    simulation.start(waiter())
    simulation.start(firer())
    simulation.run(10)
    assert moments == [2.0, 5.0]


def test_alone_each_part_is_as_fast_as_it_was_measured():
    assert outcome(rollouts=3, ranks=0).steps_per_s == pytest.approx(3000, rel=0.03)
    assert outcome(robots=7, hz=10.0).calls_per_s == pytest.approx(70, rel=0.03)
    # One core makes 20 updates a second, and the limiter lets rollouts follow: 20 x 64 windows / 4 a step.
    alone = outcome(rollouts=2, ranks=1)
    assert alone.updates_per_s == pytest.approx(20, rel=0.05)
    assert alone.steps_per_s == pytest.approx(320, rel=0.1)


def test_the_limiter_makes_the_learner_wait_for_slow_rollouts():
    slow = outcome(rollouts=1, ranks=1, update_speed=100.0, seconds=20.0)
    # 1,000 steps a second are worth 4,000 windows.
    assert slow.windows_per_s == pytest.approx(4000, rel=0.05)
    assert slow.load["learner"] < 0.1


def test_parts_that_share_a_machine_are_slower_together():
    one, many = outcome(rollouts=1, cores=2.0), outcome(rollouts=8, cores=2.0)
    assert one.steps_per_s == pytest.approx(990, rel=0.03)
    assert many.steps_per_s == pytest.approx(2 / (COSTS["rollout_s"] + COSTS["insert_s"]), rel=0.03)


def test_a_full_replay_server_gives_no_more_and_two_give_twice_as_much():
    full = outcome(rollouts=400, seconds=5.0)
    assert full.steps_per_s == pytest.approx(1 / COSTS["insert_s"], rel=0.02)
    assert full.load["replay"] == pytest.approx(1.0, rel=0.02)
    assert outcome(rollouts=400, shards=2, seconds=5.0).steps_per_s == pytest.approx(2 / COSTS["insert_s"], rel=0.05)


def test_a_replica_with_too_many_robots_is_late_and_two_are_not():
    # A call takes it half a millisecond, and 0.375 more in a full batch: 114 robots at 10 Hz would fill it.
    calm, full = outcome(robots=60, seconds=3.0), outcome(robots=130, seconds=3.0)
    assert calm.missed == 0
    assert full.load["replica"] > 0.95
    assert full.missed > 0.9
    assert outcome(robots=130, replicas=2, seconds=3.0).missed == 0


def test_growth_ends_where_nothing_is_full():
    from scale_parts.study import FULL, grow
    from scale_parts.system import Costs

    steps = list(grow(Costs(**COSTS), FACTS, robots=20, ranks=4, hz=50.0, gpu_speed=10.0))
    assert [step["next"] for step in steps][-1] == ""
    assert {"rollouts", "replicas"} <= {step["next"] for step in steps}
    last = steps[-1]
    assert last["load"]["learner"] >= FULL
    assert max(value for part, value in last["load"].items() if part != "learner") <= FULL
    assert last["missed"] == 0


def test_the_command_goes_on_from_measured_costs(tmp_path, monkeypatch, capsys):
    import runpy

    measured = {"steps_per_s": 900.0, "updates_per_s": 10.0, "cores": 2.0}
    calls = {"calls_per_s": 40.0, "p50_ms": 4.0, "p99_ms": 8.0}
    earlier = {
        "preset": "demo",
        "cores": 2,
        "hz": 10.0,
        "costs": COSTS,
        "facts": FACTS,
        "pipeline": [{"rollouts": 1, "ranks": 1, "measured": measured}],
        "serving": [{"robots": 4, "measured": calls}],
    }
    (tmp_path / "costs.json").write_text(json.dumps(earlier))
    monkeypatch.setattr("scale_parts.study.ROBOTS", (1, 10))
    monkeypatch.setattr("scale_parts.study.RANKS", (1, 2))
    monkeypatch.setattr("scale_parts.study.ROLLOUTS", (1, 4))
    words = ["--costs", tmp_path / "costs.json", "--json", tmp_path / "answer.json", "--plot", tmp_path / "scale.png"]
    words += ["--robots", 20, "--ranks", 2, "--gpu-speed", 2]
    monkeypatch.setattr("sys.argv", ["scale", *map(str, words)])
    runpy.run_path(str(FOLDER / "scale.py"), run_name="__main__")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["summary"]["cluster"]["next"] == ""
    (pipeline, serving) = answer["summary"]["checks"]
    assert pipeline["updates_per_s"] == pytest.approx(answer["pipeline"][0]["simulated"]["updates_per_s"] / 10.0)
    assert serving["calls_per_s"] == pytest.approx(1.0, rel=0.05)
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    assert capsys.readouterr().out


def test_layouts_are_immutable():
    from scale_parts.system import Layout

    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout().robots = 3
