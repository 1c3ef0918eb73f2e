"""Virtual environments of the peers: made once, pinned, and entered by the peer's own script.

python benchmarks/replay_peers/venvs.py [NAME ...] [--folder .venv-peers]
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from workload import unavailable

INSTALL_TIMEOUT_S = 1800.0
FOLDER = Path(__file__).resolve().parents[2] / ".venv-peers"


class VenvError(RuntimeError):
    """No interpreter here could install the peer's pinned versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What a peer needs.

    Attributes:
        pins: Alternatives in order; the first that installs is taken.
        pythons: Versions of Python that its wheels exist for, best first.
        probe: An import that must work, with no output.
    """

    pins: tuple[tuple[str, ...], ...]
    pythons: tuple[str, ...]
    probe: str


# The CPU build of torch spares several GB of CUDA libraries where the package index has it.
TORCHRL = ("torchrl==0.14.1", "tensordict==0.14.3", "numpy==2.4.6")
PEERS = {
    "dm_reverb": Peer(
        pins=(("dm-reverb==0.14.0", "tensorflow-cpu==2.15.1", "numpy==1.26.4", "dm-tree==0.1.8"),),
        pythons=("3.11", "3.10", "3.9"),
        probe="import reverb",
    ),
    "torchrl": Peer(
        pins=(("torch==2.13.0+cpu", *TORCHRL), ("torch==2.13.0", *TORCHRL)),
        pythons=("3.11", "3.12"),
        probe="from torchrl.data import SliceSampler",
    ),
}


def interpreters(versions: tuple[str, ...]) -> list[str]:
    """Paths of the Pythons of these versions: the running one, PATH, then pyenv's."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for version in versions:
        if version == running:
            found.append(str(Path(sys.base_prefix, "bin", f"python{version}")))
        candidates = [shutil.which(f"python{version}")]
        candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), reverse=True)
        found += [path for path in candidates if path]
    return list(dict.fromkeys(str(Path(path).resolve()) for path in found))


def run(*command: str | Path) -> str | None:
    """None if the command succeeded, else the end of what it said."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"still running after {INSTALL_TIMEOUT_S:.0f} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return None if done.returncode == 0 else " / ".join(lines[-3:])


def ensure(name: str, folder: Path) -> Path:
    """The Python of the peer's environment, which is made on the first call (minutes, and about 1 GB).

    Raises:
        VenvError: With what each attempt said.
    """
    peer, venv = PEERS[name], folder.resolve() / name
    python, mark = venv / "bin" / "python", venv / "pins.txt"
    if mark.exists() and python.exists() and mark.read_text() in ("\n".join(pins) for pins in peer.pins):
        return python
    failures = []
    for interpreter in interpreters(peer.pythons):
        for pins in peer.pins:
            print(f"making {venv} with {interpreter}: {' '.join(pins)}", file=sys.stderr, flush=True)
            shutil.rmtree(venv, ignore_errors=True)
            failure = (
                run(interpreter, "-m", "venv", venv)
                or run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins)
                or run(python, "-c", peer.probe)
            )
            if failure is None:
                mark.write_text("\n".join(pins))
                return python
            failures.append(f"{interpreter}: {failure}")
    shutil.rmtree(venv, ignore_errors=True)
    tried = "; ".join(failures) or f"no Python {' or '.join(peer.pythons)} found"
    raise VenvError(f"{name} cannot be installed: {tried}. Expected one of {peer.pins} on one of {peer.pythons}.")


def enter(name: str, folder: Path) -> None:
    """Goes on in the peer's environment: returns inside it, or leaves with an ``unavailable`` answer."""
    if Path(sys.prefix).resolve() == folder.resolve() / name:
        return
    try:
        python = ensure(name, folder)
    except VenvError as error:
        unavailable(str(error))
    else:
        os.execv(python, [str(python), *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    if unknown := set(options.names) - set(PEERS):
        parser.error(f"got {sorted(unknown)}: expected names out of {list(PEERS)}")
    for name in options.names or PEERS:
        try:
            print(ensure(name, options.folder))
        except VenvError as error:
            unavailable(str(error))


if __name__ == "__main__":
    main()
