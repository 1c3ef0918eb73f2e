import os
import sys
import time

import pytest
from lab import Lab, why_not


@pytest.fixture
def lab():
    """Without the privileges for it a test is skipped, or fails where `make test-cluster` asked for it."""
    reason = why_not() if sys.platform == "linux" else "network namespaces are Linux"
    if reason:
        give_up = pytest.fail if os.environ.get("VLA_DIST_LAB_REQUIRED") else pytest.skip
        give_up(f"no lab on this machine: {reason}")
    lab = Lab()
    yield lab
    lab.close()


@pytest.fixture
def milestone(record_property):
    """Says, and writes down, how long after the start of the test something had come about."""
    started = time.monotonic()

    def reach(name: str) -> None:
        record_property(name, round(time.monotonic() - started))
        print(f"[{time.monotonic() - started:4.0f} s] {name}", flush=True)

    return reach
