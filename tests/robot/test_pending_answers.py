"""Answers find their observations once."""

from vla_dist.protocol.v1 import policy_pb2, types_pb2
from vla_dist.robot.pending_answers import PendingAnswers

FIRST, SECOND = types_pb2.Observation(instruction="1"), types_pb2.Observation(instruction="2")
ANSWER = policy_pb2.ControlRefusal()


def test_an_answer_that_comes_twice_is_neither_late_nor_kept() -> None:
    pending = PendingAnswers()
    pending.expect(0, FIRST, give_up_at=1.0)
    assert pending.settle(0, ANSWER) == (FIRST, True)
    assert pending.take(0) is ANSWER
    assert pending.settle(0, ANSWER) == (None, False)
    assert not pending.has(0)


def test_an_answer_after_its_time_is_late_and_its_observation_known() -> None:
    pending = PendingAnswers()
    pending.expect(0, FIRST, give_up_at=1.0)
    pending.expect_nothing()
    pending.expect(1, SECOND, give_up_at=2.0)
    assert pending.oldest_give_up_at() == 1.0
    assert pending.settle(0, ANSWER) == (FIRST, False)
    assert pending.settle(1, ANSWER) == (SECOND, True)
    assert pending.oldest_give_up_at() is None


def test_a_new_stream_knows_nothing_of_the_old_ones_answers() -> None:
    pending = PendingAnswers()
    pending.expect(0, FIRST, give_up_at=1.0)
    pending.repeat(1)
    pending.forget()
    assert pending.settle(0, ANSWER) == (None, False)
    assert not pending.is_repeat(1)
    pending.repeat(2)
    assert pending.is_repeat(2)
    assert not pending.is_repeat(2)
