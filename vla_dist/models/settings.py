"""Settings of models by name: which there are, and words such as ``hidden_dim=64`` as changes of the declared types."""

import contextlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError

from vla_dist.core.errors import ConfigError
from vla_dist.models.member import setting_types

C = TypeVar("C")


def parse_changes(config: type[Any], words: Sequence[str], *, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``name=value`` words to keyword arguments of ``config``; a name that comes twice keeps its last value.

    Args:
        known: name -> type of its settings; None: those of a member of the zoo.

    Raises:
        ConfigError: a word without ``=``, a setting that does not exist, or a value of another type.
    """
    known = setting_types(config) if known is None else known
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"change {word!r} of {_label(config)} must be name=value")
        require_settings(_label(config), known, [name])
        try:
            changes[name] = _parsed(text, known[name])
        except ValueError as error:
            raise ConfigError(
                f"change {word!r} of {_label(config)}: {name} must be {_words_for(known[name])}"
            ) from error
    return changes


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a question that ends with a space; nothing where none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def require_settings(whose: str, known: Iterable[str], given: Iterable[str]) -> None:
    """Raises ConfigError naming a setting that does not exist, and the nearest one.

    A transformers config would take any name without a word.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{whose} has no setting {name!r}; {did_you_mean(name, known)}its settings are "
                f"{', '.join(known) or 'none'}"
            )


def build_config(kind: type[C], settings: Mapping[str, Any], **others: Any) -> C:
    """A config from settings of which each must exist; ``others`` go before them. Raises ConfigError."""
    given = {**settings, **others}
    require_settings(_label(kind), setting_types(kind), given)
    return kind(**given)


def require_heads(whose: str, width: int, num_heads: int) -> None:
    """Raises ConfigError where attention heads do not share a width evenly."""
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"{num_heads} heads do not divide {whose} {width}; choose a multiple")


@contextlib.contextmanager
def config_errors(whose: str) -> Iterator[None]:
    """What transformers says to settings that cannot work, in a dozen ways, as ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{whose} cannot be built: {reason}; change its settings") from error


def _parsed(text: str, kind: Any) -> Any:
    """Raises ValueError."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _first_of(text, typing.get_args(kind))
    if origin is typing.Literal:
        return _chosen(text, typing.get_args(kind))
    if kind is types.NoneType:
        return _chosen(text, ("none",)) and None
    if kind is bool:
        return _chosen(text, ("false", "true")) == "true"
    if kind in (int, float, str):
        return kind(text)
    container = origin or kind
    value = json.loads(text)
    if container in (tuple, list) and isinstance(value, list):
        return container(value)
    if container is dict and isinstance(value, dict):
        return value
    raise ValueError(text)


def _first_of(text: str, kinds: Sequence[Any]) -> Any:
    # Text fits everything, so it is tried last.
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return _parsed(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def _chosen(text: str, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if str(choice) == text.lower() or str(choice) == text:
            return choice
    raise ValueError(text)


def _words_for(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_words_for(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    names = {types.NoneType: "none", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    return "a JSON map" if (typing.get_origin(kind) or kind) is dict else "a JSON list"


def _label(config: type[Any]) -> str:
    return str(getattr(config, "model_type", "") or config.__name__)
