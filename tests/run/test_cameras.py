"""The camera preset through the same path, briefly: minutes of drawing, so behind a marker."""

import pytest

from vla_dist.run.serve_app import free_ports

SHORT = (
    *("--rollout.episodes-per-task", "2", "--replay.min-steps", "160", "--learner.batch-size", "16"),
    *("--learner.total-updates", "20", "--learner.publish-updates", "0", "5", "10", "20"),
    *("--evaluation.episodes-per-task", "1", "--evaluation.final-episodes-per-task", "1", "--min-memory-gib", "3"),
)


@pytest.mark.slow
@pytest.mark.gl
@pytest.mark.timeout(900)
def test_an_image_policy_is_collected_trained_served_and_judged(child):
    child.start("demo", "--cameras", *SHORT, "--serving.port", str(free_ports(1)[0]))
    summary = child.finish(timeout_s=800)
    assert [version["updates"] for version in summary["versions"]] == [0, 5, 10, 20]
    assert summary["served_calls"] > 0
    assert summary["served_calls_failed"] == 0
    assert summary["peak_memory_mb"] < 6 * 1024
