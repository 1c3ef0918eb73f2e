"""What a robot installs: no torch, no Ray, no Redis, and Python 3.10."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vla_dist.robot

ROOT = Path(vla_dist.robot.__file__).parents[1]
MODULES = sorted(path.stem for path in (ROOT / "robot").glob("*.py") if path.stem != "__init__")
FILES = sorted(path for room in ("robot", "protocol", "core") for path in (ROOT / room).rglob("*.py"))
_PROGRAM = """
import sys, time
started = time.perf_counter()
import {imports}
print(time.perf_counter() - started)
print(" ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


def test_the_sdk_imports_fast_and_brings_nothing_heavy() -> None:
    program = _PROGRAM.format(imports=", ".join(f"vla_dist.robot.{name}" for name in MODULES))
    times = []
    for _ in range(3):  # the first run may have to compile, and the machine is shared
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        seconds, loaded = run.stdout.splitlines()
        times.append(float(seconds))
    heavy = {"torch", "ray", "redis", "transformers", "pyarrow", "safetensors", "gymnasium", "psutil"}
    assert heavy.isdisjoint(loaded.split())
    assert min(times) < 1.0, times


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_syntax_is_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))
