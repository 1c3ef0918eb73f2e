import json
import os
from dataclasses import replace

import pytest

from vla_dist.core.errors import WorkerFailed
from vla_dist.run.config_file import load_config
from vla_dist.run.presets import preset
from vla_dist.run.whole_trials import run_to_the_end


@pytest.mark.slow
def test_a_run_that_cannot_start_tells_the_end_of_its_log(tmp_path):
    config = replace(preset("babyai"), preset="babyia")
    with pytest.raises(WorkerFailed, match=r"ended with status 1: .*babyai"):
        run_to_the_end(config, tmp_path / "trial" / "run", os.environ)
    own = load_config(tmp_path / "trial" / "run" / "config.json")
    assert own.runs_dir == str(tmp_path / "trial")
    assert own.serving.port != config.serving.port
    assert replace(own, runs_dir=config.runs_dir, serving=config.serving) == config


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_any_setting_is_searched_by_runs_of_their_own(child, tmp_path):
    few = (
        "rollout.episodes_per_task=20",
        "replay.min_steps=150",
        "learner.total_updates=60",
        "evaluation.episodes_per_task=4",
        "evaluation.final_episodes_per_task=4",
        "learner.checkpoint_every_updates=30",
    )
    child.start("babyai", "--over", "rollout.noise_scales=[[0.0]]", *few, "--num-trials", "1", verb="tune")
    assert child.process.wait(timeout=500) == 0, child.log[-3000:]
    (written,) = tmp_path.glob("runs/tune-babyai-*/trials.json")
    (trial,) = json.loads(written.read_text())
    assert trial["error"] == ""
    assert trial["settings"]["rollout.noise_scales"] == [0.0]
    assert 0 <= trial["success"] <= 1
    (summary,) = tmp_path.glob("runs/tune-babyai-*/tune/*/run/summary.json")
    assert json.loads(summary.read_text())["updates"] == 60
