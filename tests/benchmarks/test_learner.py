"""The learner's benchmark in its smallest form: catches rot and claims nothing."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
KEYS = {"data_wait_share", "publish_to_served_ms", "ddp_equivalence", "ddp_speedup", "models", "gpu"}


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_new_version_is_served_by_what_a_replica_runs():
    from learner_parts.publishing import measure_publishing

    found = measure_publishing(num_versions=2, target_mb=1.0)
    assert found["versions"] == 2
    assert 0 < found["p50"] <= found["highest"]
    assert found["megabytes"] > 1


def test_without_a_gpu_its_part_says_so_in_a_sentence(monkeypatch):
    from learner_parts.gpu import measure_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure_gpu(seconds=0.1, batch_sizes={}, compiled=False) == "skipped: no CUDA device"


@pytest.mark.parametrize("name", ["decision_transformer:tiny", pytest.param("rt1:tiny", marks=pytest.mark.slow)])
def test_what_a_gpu_is_measured_with_works_on_a_cpu(name):
    from learner_parts.gpu import measure_models

    found = measure_models({name: 2}, seconds=0.01, compiled=False, peak=1e12, device="cpu")
    assert set(found) == {name}
    assert found[name]["flops_a_step"] > 1e6
    assert 0 < found[name]["model_flop_utilisation"] < 1
    assert sum(found[name]["kernels"].values()) <= 1.0001
    assert found[name]["samples_per_s"] > 0


@pytest.mark.slow
def test_the_wait_for_data_is_measured_on_any_device():
    from learner_parts.gpu import measure_waits

    found = measure_waits({"image": 4}, num_updates=20, device="cpu")
    assert 0 <= found["image"]["share"] <= 1
    assert found["image"]["samples_per_s"] > 0


@pytest.mark.slow
def test_the_whole_answer_has_its_keys_and_the_ranks_agree(monkeypatch, tmp_path):
    written = tmp_path / "learner.json"
    words = ["--quick", "--json", str(written), "--models", "decision_transformer:tiny"]
    monkeypatch.setattr(sys, "argv", ["learner", *words, "--ranks-model", "decision_transformer:tiny"])
    runpy.run_path(str(FOLDER / "learner.py"), run_name="__main__")
    answer = json.loads(written.read_text())
    assert set(answer) >= KEYS
    assert set(answer["models"]["decision_transformer:tiny"]["workers"]) == {"1", "2"}
    assert answer["ddp_equivalence"]["equal"]
    assert 0 <= answer["data_wait_share"]["image"]["share"] <= 1
