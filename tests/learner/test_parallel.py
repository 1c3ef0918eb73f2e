"""Ranks of one model, as real processes over gloo."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import rank_program
import torch
from safetensors.torch import load_file

from vla_dist.core.errors import ConfigError
from vla_dist.learner.parallel import OneRank, make_parallel

KINDS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name -> what two processes that share each batch came to."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, rank_program.__file__, ",".join(KINDS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def alone():
    """What one process with the whole batch comes to."""
    return rank_program.train(OneRank(), 0)


def require_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine, theirs = found[name], value
        if name.endswith("qkv.bias") and "/step/" not in name:
            # Softmax cancels a bias of all keys: its gradient is rounding noise, which Adam blows up to full steps.
            mine, theirs = (torch.cat([part for i, part in enumerate(v.chunk(3)) if i != 1]) for v in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def make_temperature():
    """As it begins."""
    return rank_program.make_own(rank_program.make_model(seed=1)).log_temperature.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_half_a_batch_are_one_rank_of_the_whole(trained, alone, kind):
    assert any(name.startswith("ema/") for name in alone)
    assert alone["algorithm/log_temperature"] != make_temperature()
    require_close(trained[kind], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_restarted_from_whole_tensors_go_on_bit_for_bit(trained, kind):
    straight, restarted = trained[kind], trained[f"{kind}-restarted"]
    assert [name for name in straight if not torch.equal(straight[name], restarted[name])] == []


def test_micro_batches_are_the_batch(alone):
    for num in (1, 3, 5):
        config = replace(rank_program.CONFIG, num_micro_batches=num)
        require_close(rank_program.train(OneRank(), 0, config=config), alone)


def test_one_rank_needs_no_process_group_and_unknown_kinds_are_refused():
    assert isinstance(make_parallel("fsdp2", num_ranks=1, device="cpu"), OneRank)
    with pytest.raises(ConfigError, match="ddp, fsdp2"):
        make_parallel("horovod", num_ranks=2, device="cpu")  # type: ignore[arg-type]
