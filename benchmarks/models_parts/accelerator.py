"""Full sizes on a GPU: bfloat16, torch.compile, and the share of the device's arithmetic that a training step uses."""

from typing import Any

import torch
from models_parts.timing import compare

from vla_dist.models.analysis.flops import count_flops
from vla_dist.models.analysis.subjects import subject
from vla_dist.models.zoo import ARCHITECTURES

# Dense bfloat16 operations a second of the tensor cores, from the vendors' data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "L40": 181e12}
WINDOWS = 64


def measure_accelerator(rounds: int) -> dict[str, Any] | str:
    if not torch.cuda.is_available():
        return "not run: this machine has no CUDA device"
    device = torch.cuda.get_device_name()
    found: dict[str, Any] = {}
    for member in ARCHITECTURES.values():
        size = "full" if "full" in member.presets else list(member.presets)[-1]
        measured = subject(member, size)
        batch = measured.batch(WINDOWS).to("cuda")
        with torch.device("cuda"):
            plain, compiled = member.model(measured.config), member.model(measured.config)
        flops = count_flops(lambda m=plain, b=batch: m.loss(b)[0].backward())
        bfloat16 = _step(plain, batch, torch.bfloat16)
        row = compare(bfloat16, _step(plain, batch, torch.float32), rounds=rounds, peer="float32")
        found[f"{member.name} {size}, {device}, bfloat16"] = row | _utilisation(flops, row["ours_ms"], device)
        row = compare(_step(compiled, batch, torch.bfloat16, compiled=True), bfloat16, rounds=rounds, peer="eager")
        found[f"{member.name} {size}, {device}, bfloat16, compiled"] = row | _utilisation(flops, row["ours_ms"], device)
    return found


def _step(model: Any, batch: Any, dtype: torch.dtype, *, compiled: bool = False) -> Any:
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    loss = torch.compile(model.loss) if compiled else model.loss

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(batch)[0]
        value.backward()
        optimiser.step()

    return step


def _utilisation(flops: int, milliseconds: float, device: str) -> dict[str, float]:
    """Of the dense bfloat16 peak; nothing where the device's peak is not known here."""
    rate = flops / (milliseconds / 1000)
    peak = next((value for name, value in PEAK.items() if name in device), None)
    return {"tflops_per_s": rate / 1e12} | ({} if peak is None else {"model_flop_utilisation": rate / peak})
