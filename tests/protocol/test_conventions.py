"""What ``buf lint`` and ``buf breaking`` ask of the .proto files, asked of the compiled descriptors, so that it holds
without ``buf``; and ``buf lint`` itself, where it is installed.

``make proto`` adds what is new to released.json: ``python tests/protocol/test_conventions.py``.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor

from vla_dist.protocol.v1 import channels_pb2, fleet_pb2, policy_pb2, types_pb2

FILES = [module.DESCRIPTOR for module in (policy_pb2, fleet_pb2, channels_pb2, types_pb2)]
_RELEASED = Path(__file__).with_name("released.json")
"""Every field, value and method that a peer in the field may know."""
_ROOT = Path(__file__).parents[2]
_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_PASCAL = re.compile(r"([A-Z][a-z0-9]+)+")


def messages(file: FileDescriptor) -> list[Descriptor]:
    found, waiting = [], list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        found.append(message)
        waiting += [nested for nested in message.nested_types if not nested.GetOptions().map_entry]
    return found


def enums(file: FileDescriptor) -> list[EnumDescriptor]:
    return list(file.enum_types_by_name.values()) + [e for m in messages(file) for e in m.enum_types]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_names_follow_the_conventions(file: FileDescriptor) -> None:
    assert file.package == "vla_dist.v1"
    for message in messages(file):
        assert _PASCAL.fullmatch(message.name), message.name
        for field in message.fields:
            assert _SNAKE.fullmatch(field.name), f"{message.name}.{field.name}"
    for enum in enums(file):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert all(value.name.startswith(prefix) for value in enum.values), enum.name
        assert enum.values_by_number[0].name == f"{prefix}UNSPECIFIED"
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"


def known() -> dict[str, str]:
    """Full name to what peers rely on: number, kind and type of fields; numbers of values; types of methods."""
    found: dict[str, str] = {}
    for file in FILES:
        for message in messages(file):
            for field in message.fields:
                of = field.message_type or field.enum_type
                kind = f"{field.type}{'*' if field.is_repeated else ''} {of.full_name if of else ''}".strip()
                found[field.full_name] = f"{field.number}: {kind}"
        for enum in enums(file):
            found |= {f"{enum.full_name}.{value.name}": str(value.number) for value in enum.values}
        for service in file.services_by_name.values():
            for method in service.methods:
                streams = f"{'stream ' * method.client_streaming}{method.input_type.name}"
                answers = f"{'stream ' * method.server_streaming}{method.output_type.name}"
                found[method.full_name] = f"{streams} -> {answers}"
    return found


def test_nothing_that_peers_know_changes() -> None:
    released, now = json.loads(_RELEASED.read_text()), known()
    assert released, "nothing was released"
    broken = {
        name: f"{was} became {now.get(name, 'nothing')}" for name, was in released.items() if now.get(name) != was
    }
    assert not broken, f"fields are only added; a change that cannot be made so is vla_dist.v2: {broken}"


@pytest.mark.skipif(shutil.which("buf") is None, reason="needs buf, for example npm install -g @bufbuild/buf")
def test_buf_finds_nothing() -> None:
    done = subprocess.run(["buf", "lint"], cwd=_ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


if __name__ == "__main__":
    # What is there stays as it was, so that a change is told by the test and not written over.
    everything = known() | json.loads(_RELEASED.read_text())
    _RELEASED.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
