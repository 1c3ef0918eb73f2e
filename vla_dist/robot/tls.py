"""Certificates of a robot's connection."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from vla_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files: whom the robot trusts, and who it is."""

    ca: Path
    """Certificates that may have signed the server's."""
    certificate: Path | None = None
    """The robot's own, where the server asks for one; its common name is the robot_id."""
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a robot's certificate needs its key, and a key its certificate; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ConfigError naming the file that cannot be read."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca),
            private_key=None if self.key is None else _read(self.key),
            certificate_chain=None if self.certificate is None else _read(self.certificate),
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name the PEM files of this robot") from error
