import dataclasses

import numpy as np
import pytest

from vla_dist.core.errors import DataError
from vla_dist.testing.fakes import make_segment, make_spec

SPEC = make_spec()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 0}, "within 1..8"),
        ({"length": 9}, "within 1..8"),
        ({"length": 5}, "only the last one may be padded"),
        ({"episode_id": ""}, "1 to 64 ASCII"),
        ({"episode_id": "ü"}, "1 to 64 ASCII"),
        ({"segment_index": -1}, "negative"),
        ({"source": "ghost"}, "expert, policy, human"),
        ({"proprio": np.zeros((3, 5), np.float32)}, "'proprio' has 3 rows, expected 8"),
        ({"images": {"top": np.zeros((2, 4, 4, 3), np.uint8)}}, "'top' has 2 rows"),
    ],
)
def test_a_segment_that_contradicts_itself_is_refused(change, words):
    segment = make_segment(SPEC, episode_id="e")
    with pytest.raises(DataError, match=words):
        dataclasses.replace(segment, **change)


def test_only_the_last_segment_may_be_short():
    assert make_segment(SPEC, episode_id="e", length=3, is_last=True).length == 3
