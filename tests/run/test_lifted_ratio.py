"""The ratio of samples to inserts ends where one side has ended, and not before."""

import dataclasses
from types import SimpleNamespace

import pytest

from vla_dist.core.errors import Unreachable
from vla_dist.run.controller import RunController
from vla_dist.run.presets import preset


class Table:
    """Notes limiters; away as often as it is told."""

    def __init__(self, away=0):
        self.away, self.limiters = away, []

    def override_limiter(self, limiter):
        if self.away:
            self.away -= 1
            raise Unreachable("Redis does not answer")
        self.limiters.append(limiter)


def controller_of(*, collects, trained=False, teacher="expert", robots=0, away=0):
    config = preset("babyai")
    made = object.__new__(RunController)  # its other parts need a whole run
    made._config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, teacher=teacher),
        fleet=dataclasses.replace(config.fleet, num_robots=robots),
    )
    archiver = SimpleNamespace(name="archiver", is_done=False)
    made._hosts = [archiver, *(SimpleNamespace(name=f"rollout-{n}", is_done=not collects) for n in range(2))]
    made._training = SimpleNamespace(is_done=trained)
    made._table, made._ratio_is_lifted = Table(away), False
    return made


@pytest.mark.parametrize(
    ("state", "is_lifted"),
    [
        ({"collects": True}, False),
        ({"collects": False}, True),
        ({"collects": False, "robots": 2}, False),
        ({"collects": False, "teacher": "none"}, False),
        ({"collects": True, "trained": True}, True),
        ({"collects": False, "teacher": "none", "trained": True}, True),
    ],
)
def test_the_ratio_is_lifted_where_nobody_samples_or_nobody_inserts_any_more(state, is_lifted):
    made = controller_of(**state)
    made._lift_ratio()
    made._lift_ratio()
    assert [limiter.samples_per_insert for limiter in made._table.limiters] == ([None] if is_lifted else [])


def test_a_store_that_is_away_is_asked_again():
    made = controller_of(collects=False, away=1)
    made._lift_ratio()
    assert made._table.limiters == []
    made._lift_ratio()
    assert len(made._table.limiters) == 1
