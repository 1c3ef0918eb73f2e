"""The one exception tree. Each error also inherits the standard type a caller would expect.

    VlaDistError
    |-- ConfigError            (ValueError)       a setting, preset or option that cannot work
    |   `-- MoveRefused                           a channel that may not be moved so
    |-- DataError              (ValueError)       an array, segment or message that does not fit
    |   `-- IntegrityError                        bytes differ from their hash or header
    |-- ContractMismatch       (ValueError)       robot and policy disagree on dimensions, units, cameras, rate
    |-- Unauthorised           (PermissionError)  no token, or a wrong one
    |   `-- Forbidden                             a known caller without the role, or for another robot
    |-- NotFound               (LookupError)      a version, channel, session or episode that does not exist
    |-- Unreachable            (ConnectionError)  Redis or a server does not answer
    |-- WaitTimeout            (TimeoutError)     a wait ended; the message says what it waited for
    |   |-- ReplayWait                            the limiter or a full server asked to wait
    |   `-- DeadlineExceeded                      an answer came too late to be executed
    |-- ResourceMissing        (OSError)          memory, port, system library or program is missing
    `-- WorkerFailed           (RuntimeError)     a component died more often than allowed

Every message says what was got, what was expected, and what to do.
"""


class VlaDistError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(VlaDistError, ValueError):
    """A setting, preset or option that cannot work."""


class MoveRefused(ConfigError):
    """A channel that may not be moved so: without evidence, or to a version that does not fit its robots."""


class DataError(VlaDistError, ValueError):
    """An array, segment or message that does not fit its spec."""


class IntegrityError(DataError):
    """Bytes that differ from their hash, header or sequence number."""


class ContractMismatch(VlaDistError, ValueError):
    """Robot and policy disagree; the message lists every difference."""


class Unauthorised(VlaDistError, PermissionError):
    """No token, or one that the server does not know."""


class Forbidden(Unauthorised):
    """A known caller asked for what its role, or its robot, does not allow."""


class NotFound(VlaDistError, LookupError):
    """A version, channel, session, episode or task that does not exist."""


class Unreachable(VlaDistError, ConnectionError):
    """A server that does not answer."""


class WaitTimeout(VlaDistError, TimeoutError):
    """A wait ended before its condition held."""


class ReplayWait(WaitTimeout):
    """The replay asked the caller to wait longer than it was willing to."""


class DeadlineExceeded(WaitTimeout):
    """An action that would have come too late; it must not be executed."""


class ResourceMissing(VlaDistError, OSError):
    """The machine lacks memory, a free port, a system library or a program."""


class WorkerFailed(VlaDistError, RuntimeError):
    """A component died more often than its restart budget allows."""
