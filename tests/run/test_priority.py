import multiprocessing
import os
import threading

from vla_dist.run.priority import make_way


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
