"""Processes that end with those that started them."""

import os
import signal
import subprocess
import sys
import time

import psutil

_DRIVER = (
    "import os, time; from vla_dist.run.children import end_when_orphaned; "
    "end_when_orphaned(grace_s=0.1); print(os.getpid(), flush=True); time.sleep(600)"
)


def test_a_driver_ends_when_the_shell_that_started_it_was_killed_alone():
    # Two commands, so that the shell does not become the driver.
    words = ["sh", "-c", f'{sys.executable} -c "{_DRIVER}"; true']
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        driver = psutil.Process(int(shell.stdout.readline()))
        assert driver.ppid() == shell.pid
        time.sleep(1.5)
        assert driver.is_running()
        os.kill(shell.pid, signal.SIGKILL)
        psutil.wait_procs([driver], timeout=30)
        assert not driver.is_running()
