"""What ``buf lint`` asks of the .proto files, asked of the compiled descriptors, so that it holds without ``buf``."""

import re

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor

from vla_dist.protocol.v1 import fleet_pb2, policy_pb2, types_pb2

FILES = [module.DESCRIPTOR for module in (policy_pb2, fleet_pb2, types_pb2)]
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
