"""Parts of a model that learn at a pace of their own, such as vision slower than what decides."""

import math
from collections.abc import Iterable, Mapping, Sequence

from vla_dist.core.errors import ConfigError
from vla_dist.models.settings import did_you_mean


def parse_part_rates(words: Sequence[str]) -> dict[str, float]:
    """``part=factor`` words, of which the last for a part counts.

    Raises:
        ConfigError: a word of another form, or a factor that is negative or no number.
    """
    factors = {}
    for word in words:
        part, _, text = word.partition("=")
        try:
            factors[part] = float(text)
        except ValueError:
            factors[part] = math.nan
        if not part or not 0.0 <= factors[part] < math.inf:
            raise ConfigError(f"part_learning_rates {word!r} must be part=factor, as visual=0.1; 0: it stays as it is")
    return factors


def require_parts(factors: Mapping[str, float], parameters: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest name, where a part has none of the parameters that are trained."""
    names = list(parameters)
    parts = sorted({name.partition(".")[0] for name in names})
    for part in factors:
        if not any(_is_within(name, part) for name in names):
            raise ConfigError(
                f"part_learning_rates names {part!r}, of which nothing is trained; {did_you_mean(part, parts)}"
                f"the parts of this model are {', '.join(parts)}, and what lies in them, as in {names[0]}"
            )


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Of a parameter: that of the innermost part around it that has one, else 1."""
    around = [part for part in factors if _is_within(name, part)]
    return factors[max(around, key=len)] if around else 1.0


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
