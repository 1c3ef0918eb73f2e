"""Rate and model-flop utilisation of full models on a GPU, in bf16."""

from typing import Any

import torch
from learner_parts.workload import make_batch, make_model, make_step, seconds_each
from torch.utils.flop_counter import FlopCounterMode

from vla_dist.learner.algorithms.algorithm import Algorithm, NoSettings
from vla_dist.learner.train_step import LossModule
from vla_dist.models.zoo import ARCHITECTURES

_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense, flops a second, from the vendor's data sheets."""


def measure_gpu(*, seconds: float, batch_sizes: dict[str, int], compiled: bool) -> dict[str, Any] | str:
    """By model; one sentence where there is no GPU."""
    if not torch.cuda.is_available():
        return "skipped: no CUDA device"
    name = torch.cuda.get_device_name()
    peak = next((flops for word, flops in _PEAK_BF16.items() if word in name), None)
    models = {}
    for model_name, batch_size in batch_sizes.items():
        if model_name.partition(":")[0] in ARCHITECTURES:
            models[model_name] = _measure(model_name, batch_size, seconds, compiled, peak)
    return {"device": name, "peak_bf16_flops_per_s": peak, "models": models}


def _measure(name: str, batch_size: int, seconds: float, compiled: bool, peak: float | None) -> dict[str, Any]:
    model = make_model(name, cameras=name.startswith("rt1"))
    step = make_step(model, device="cuda", precision="bfloat16", compile=compiled)
    batch = make_batch(model, batch_size).to("cuda")

    def update() -> None:
        step(batch, 0)
        torch.cuda.synchronize()

    # Counted on the plain module, from the same weights: a compiled one hides its products.
    algorithm = Algorithm(NoSettings(), model=model.config, conditioning="none")
    with FlopCounterMode(display=False) as counter:
        loss, _ = LossModule(model, algorithm, precision="bfloat16")(batch)
        loss.backward()
    flops = float(counter.get_total_flops())
    each = seconds_each(update, seconds=seconds, warm_up=5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            update()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1.0
    return {
        "batch_size": batch_size,
        "compiled": compiled,
        "step_ms": 1000 * each,
        "samples_per_s": batch_size / each,
        "flops_a_step": flops,
        "model_flop_utilisation": None if peak is None else flops / each / peak,
        "device_busy_share": min(1.0, total / 1e6 / 5 / each),
        "kernels": {event.key[:80]: event.self_device_time_total / total for event in events[:10]},
    }
