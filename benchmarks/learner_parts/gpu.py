"""On a GPU, in bf16: rate and model-flop utilisation of full models, where the rest goes, and the wait for data."""

from typing import Any

import torch
from learner_parts.waiting import measure_waiting
from learner_parts.workload import make_batch, make_model, make_step, seconds_each
from torch.utils.flop_counter import FlopCounterMode

from vla_dist.learner.algorithms.algorithm import Algorithm, NoSettings
from vla_dist.learner.train_step import LossModule

_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense, flops a second, from the vendor's data sheets."""


_WAITING_MODEL = "decision_transformer:small"
_WAITING_BATCHES = {"low_dim": 256, "image": 64}


def measure_gpu(*, seconds: float, batch_sizes: dict[str, int], compiled: bool) -> dict[str, Any] | str:
    """By model; one sentence where there is no GPU."""
    if not torch.cuda.is_available():
        return "skipped: no CUDA device"
    name = torch.cuda.get_device_name()
    peak = next((flops for word, flops in _PEAK_BF16.items() if word in name), None)
    return {
        "device": name,
        "peak_bf16_flops_per_s": peak,
        "models": measure_models(batch_sizes, seconds=seconds, compiled=compiled, peak=peak),
        "data_wait_share": measure_waits(_WAITING_BATCHES, num_updates=max(20, int(40 * seconds))),
    }


def measure_waits(batch_sizes: dict[str, int], *, num_updates: int, device: str = "cuda") -> dict[str, Any]:
    """Of a small model, whose updates ask for data more often than a large one's; batches are pinned on a GPU."""
    return {
        kind: measure_waiting(
            _WAITING_MODEL,
            cameras=kind == "image",
            batch_size=batch_size,
            num_updates=num_updates,
            num_episodes=40 if kind == "image" else 200,
            device=device,
        )
        for kind, batch_size in batch_sizes.items()
    }


def measure_models(
    batch_sizes: dict[str, int], *, seconds: float, compiled: bool, peak: float | None, device: str = "cuda"
) -> dict[str, Any]:
    """Args:
    batch_sizes: ARCHITECTURE:PRESET -> B.
    peak: flops a second that the device can do at most; None: unknown, and so the utilisation.
    device: ``cpu`` shows that all of it works where there is no GPU; its figures mean nothing.
    """
    return {name: _measure(name, size, seconds, compiled, peak, device) for name, size in batch_sizes.items()}


def _measure(
    name: str, batch_size: int, seconds: float, compiled: bool, peak: float | None, device: str
) -> dict[str, Any]:
    model = make_model(name, cameras=name.startswith("rt1"))
    step = make_step(model, device=device, precision="bfloat16", compile=compiled)
    batch = make_batch(model, batch_size).to(device)
    is_gpu = device == "cuda"

    def update() -> None:
        step(batch, 0)
        if is_gpu:
            torch.cuda.synchronize()

    # Counted on the plain module, from the same weights: a compiled one hides its products.
    algorithm = Algorithm(NoSettings(), model=model.config, conditioning="none")
    with FlopCounterMode(display=False) as counter:
        loss, _ = LossModule(model, algorithm, precision="bfloat16")(batch)
        loss.backward()
    flops = float(counter.get_total_flops())
    each = seconds_each(update, seconds=seconds, warm_up=5)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if is_gpu else activity.CPU]) as profile:
        for _ in range(5):
            update()
    spent = {
        event.key: event.self_device_time_total if is_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    total = sum(spent.values()) or 1.0
    return {
        "batch_size": batch_size,
        "compiled": compiled,
        "step_ms": 1000 * each,
        "samples_per_s": batch_size / each,
        "flops_a_step": flops,
        "model_flop_utilisation": None if peak is None else flops / each / peak,
        "device_busy_share": min(1.0, total / 1e6 / 5 / each),
        "kernels": {key[:80]: spent[key] / total for key in sorted(spent, key=lambda key: -spent[key])[:10]},
    }
