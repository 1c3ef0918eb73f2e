import pickle

import pytest
import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError

from vla_dist.core.errors import ResourceMissing
from vla_dist.run.board import BoardLink


class SlowBoard:
    """Stands for the actor: answers every call by what ``ray.get`` is patched to do."""

    class read:  # noqa: N801
        @staticmethod
        def remote():
            return "reference"


def test_a_board_that_is_late_shows_what_it_showed_last(monkeypatch):
    answers = [{"learner": {"loss": 1.0}}, GetTimeoutError("busy"), {"learner": {"loss": 0.5}}]

    def get(reference, *, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: SlowBoard)
    monkeypatch.setattr(ray, "get", get)
    link = BoardLink("run")
    assert [link.read()["learner"]["loss"] for _ in range(3)] == [1.0, 1.0, 0.5]
    answers.append(GetTimeoutError("busy"))
    assert pickle.loads(pickle.dumps(link)).read() == {}  # noqa: S301


def test_a_run_that_another_driver_has_is_refused_once_a_killed_one_had_time_to_vanish(monkeypatch):
    refusals = [ActorAlreadyExistsError("taken")] * 2

    class Maker:
        def options(self, **options):
            return self

        def remote(self):
            if refusals:
                raise refusals.pop()
            return SlowBoard

    monkeypatch.setattr(ray, "remote", lambda actor: Maker())
    with pytest.raises(ResourceMissing, match="another driver has the run babyai-1; wait for it, or stop its job"):
        BoardLink("babyai-1", taken_s=0.0).start()
    BoardLink("babyai-1", taken_s=60.0).start()
    assert refusals == []
