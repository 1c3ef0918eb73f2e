"""Who may call the policy service of a run."""

from pathlib import Path

from vla_dist.core.errors import ConfigError
from vla_dist.run.config import RunConfig, ServingSettings
from vla_dist.run.files import AUDIT
from vla_dist.serving.authorisation import AccessConfig, TokenFile


def access_of(settings: ServingSettings, run_dir: Path) -> AccessConfig:
    """What each replica is given; refusals are written into the run's folder."""
    return AccessConfig(
        token=settings.token or None,
        tokens_file=Path(settings.tokens) if settings.tokens else None,
        audit=run_dir / AUDIT,
    )


def require_access(config: RunConfig) -> None:
    """Refuse at the start what replicas, or the run's own robots, would stumble over.

    Raises:
        ConfigError: the token file is none, or the run's own robots would be refused.
    """
    serving = config.serving
    if not serving.tokens:
        return
    TokenFile(Path(serving.tokens))
    if config.fleet.num_robots and not serving.token:
        raise ConfigError(
            f"{serving.tokens} asks robots for a token, and the {config.fleet.num_robots} simulated ones of this run "
            "have none; give --serving.token for them, or --fleet.num-robots 0"
        )
