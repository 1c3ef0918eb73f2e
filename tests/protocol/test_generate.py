"""The committed code is what the compiler makes of the .proto files, and robots with old runtimes can load it."""

import importlib.metadata
import re

import pytest

from vla_dist.protocol import generate
from vla_dist.protocol.v1 import fleet_pb2, policy_pb2, types_pb2

FILES = [types_pb2.DESCRIPTOR, policy_pb2.DESCRIPTOR, fleet_pb2.DESCRIPTOR]


def test_committed_code_equals_a_regeneration() -> None:
    assert generate.stale(generate.generate()) == [], "run python -m vla_dist.protocol.generate"


def test_a_changed_file_counts_as_stale() -> None:
    texts = generate.generate()
    texts["types_pb2.py"] += "# changed"
    del texts["fleet_pb2.py"]
    assert generate.stale(texts) == ["fleet_pb2.py", "types_pb2.py"]


def test_generated_code_asks_for_no_newer_runtime_than_the_package() -> None:
    requirements = " ".join(importlib.metadata.requires("vla-dist") or [])
    declared = {name: re.search(rf"{name}>=([\d.]+)", requirements) for name in ("protobuf", "grpcio")}
    for name, floor in (("protobuf", generate.PROTOBUF_FLOOR), ("grpcio", generate.GRPC_FLOOR)):
        match = declared[name]
        assert match is not None
        assert tuple(int(part) for part in match[1].split(".")) == floor[: len(match[1].split("."))]
    text = (generate.PACKAGE_ROOT / generate.PROTO_FOLDER / "policy_pb2.py").read_text()
    assert re.search(r"PUBLIC,\s+6,\s+31,\s+0,", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.rpartition("/")[2])
def test_names_follow_the_protobuf_style(file) -> None:  # type: ignore[no-untyped-def]
    assert file.package == "vla_dist.v1"
    for enum in file.enum_types_by_name.values():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
    for message in file.message_types_by_name.values():
        assert re.fullmatch(r"([A-Z][a-z0-9]+)+", message.name)
        assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name) for field in message.fields)
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"
