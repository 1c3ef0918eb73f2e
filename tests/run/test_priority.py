import gc
import multiprocessing
import os
import sys
import threading

from vla_dist.run.priority import answer_promptly, make_way


def _niceness_of_threads(answers) -> None:
    go_on = threading.Event()
    early = threading.Thread(target=go_on.wait, args=(10,))
    early.start()
    make_way()
    late = threading.Thread(target=go_on.wait, args=(10,))
    late.start()
    answers.put([os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) for thread in (early, late)])
    go_on.set()
    make_way()
    answers.put(os.getpriority(os.PRIO_PROCESS, 0))


def test_threads_that_were_there_and_those_that_come_make_way() -> None:
    # In a process of its own: an ordinary user cannot take a priority back.
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_niceness_of_threads, args=(answers,))
    process.start()
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert answers.get(timeout=30) == [max(mine, 10)] * 2
    assert answers.get(timeout=30) == max(mine, 10), "a second call lowered it further"
    process.join(10)


def _after_answering_promptly(answers) -> None:
    answer_promptly()
    answers.put((sys.getswitchinterval(), gc.get_freeze_count() > 10 * len(gc.get_objects()), gc.isenabled()))


def test_who_answers_robots_neither_keeps_the_interpreter_nor_looks_for_garbage_among_what_stays() -> None:
    # In a process of its own: objects that were frozen would be in the way of other tests.
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_after_answering_promptly, args=(answers,))
    process.start()
    switch_interval_s, most_is_frozen, still_collects = answers.get(timeout=30)
    assert switch_interval_s < 0.001
    assert most_is_frozen
    assert still_collects
    process.join(10)
