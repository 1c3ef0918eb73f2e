import sys

import pytest
from lab import Lab, why_not


@pytest.fixture
def lab():
    """Without the privileges for it a test is skipped, which `make test-cluster` does not count as passed."""
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux")
    if reason := why_not():
        pytest.skip(f"no lab on this machine: {reason}")
    lab = Lab()
    yield lab
    lab.close()
