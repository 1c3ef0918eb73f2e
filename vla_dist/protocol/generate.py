"""Writes the protobuf and gRPC code beside the .proto files: ``python -m vla_dist.protocol.generate``.

The code is committed, so that a robot needs no compiler. The generator stamps its own version as the lowest runtime it
accepts; robots run older ones, so the stamp is lowered to the floor that the package declares. Between the floor and
the current generator the code is otherwise the same.
"""

import argparse
import re
import tempfile
from pathlib import Path

from vla_dist.core.errors import IntegrityError, ResourceMissing

PROTOBUF_FLOOR = (6, 31, 0)
GRPC_FLOOR = (1, 78, 0)
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PROTO_FOLDER = Path("vla_dist/protocol/v1")
_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate() -> dict[str, str]:
    """File name to its text, compiled from every .proto of the folder.

    Raises:
        ResourceMissing: grpcio-tools is not installed.
        IntegrityError: the compiler refused a file; it has printed why.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise ResourceMissing("the generator needs grpcio-tools; install it with: pip install vla-dist[dev]") from error
    sources = sorted(str(path.relative_to(PACKAGE_ROOT)) for path in (PACKAGE_ROOT / PROTO_FOLDER).glob("*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        status = protoc.main(
            [
                "protoc",
                f"-I{PACKAGE_ROOT}",
                f"-I{include}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                f"--grpc_python_out={folder}",
                *[str(PACKAGE_ROOT / source) for source in sources],
            ]
        )
        if status:
            raise IntegrityError(f"the protobuf compiler ended with {status}; correct the .proto file it named above")
        written = sorted((Path(folder) / PROTO_FOLDER).iterdir())
        return {path.name: _lower_floor(path.read_text()) for path in written if _is_wanted(path)}


def stale(texts: dict[str, str]) -> list[str]:
    """Names of committed files that differ from ``texts``, are missing, or have no source any more."""
    folder = PACKAGE_ROOT / PROTO_FOLDER
    committed = {path.name: path.read_text() for path in folder.iterdir() if path.name.endswith(_SUFFIXES)}
    return sorted(name for name in texts.keys() | committed.keys() if texts.get(name) != committed.get(name))


def main() -> None:
    """Write the files; with ``--check`` only say whether they are current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a committed file is stale")
    arguments = parser.parse_args()
    texts = generate()
    if arguments.check:
        if stale(texts):
            raise SystemExit(f"stale: {', '.join(stale(texts))}; run python -m vla_dist.protocol.generate")
        return
    for name, text in texts.items():
        (PACKAGE_ROOT / PROTO_FOLDER / name).write_text(text)


def _is_wanted(path: Path) -> bool:
    """A file without services gets an empty gRPC module, which nobody imports."""
    return not path.name.endswith("_pb2_grpc.py") or "Servicer" in path.read_text()


def _lower_floor(text: str) -> str:
    major, minor, patch = PROTOBUF_FLOOR
    text = re.sub(r"(# Protobuf Python Version: )[\d.]+", rf"\g<1>{major}.{minor}.{patch}", text)
    text = re.sub(
        r"(_runtime_version\.Domain\.PUBLIC,\s+)\d+,(\s+)\d+,(\s+)\d+,",
        rf"\g<1>{major},\g<2>{minor},\g<3>{patch},",
        text,
    )
    return re.sub(r"(GRPC_GENERATED_VERSION = )'[\d.]+'", rf"\g<1>'{'.'.join(str(part) for part in GRPC_FLOOR)}'", text)


if __name__ == "__main__":
    main()
