"""Models from a directory or the hub: whole, of their own kind, and never from a pickle."""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, ResourceMissing

_SHOWN = 5
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class WholePreTrainedModel(PreTrainedModel):
    """Loads all of its tensors or none.

    transformers alone fills what a file lacks with random numbers and a warning, takes another model's weights as far
    as names agree, and reads ``pytorch_model.bin`` where there are no safetensors.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors alone.

        Raises:
            ResourceMissing: no config or no safetensors there.
            ConfigError: the config is another model's.
            IntegrityError: the file was cut or damaged.
            DataError: tensors that are missing, too many, of another shape, or not finite.
        """
        source = str(pretrained_model_name_or_path)
        wants_info = bool(kwargs.pop("output_loading_info", False))
        given = {**kwargs, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            cls._require_own_kind(source, **kwargs)
            model, found = cast(tuple[Any, dict], super().from_pretrained(source, *args, **given))
        except SafetensorError as error:
            raise IntegrityError(f"the weights in {source} are damaged ({error}); save the model again") from error
        except OSError as error:
            raise ResourceMissing(
                f"{source} holds no config.json and model.safetensors of a {cls.__name__} ({error}); save it by "
                "save_pretrained. Pickles are not read"
            ) from error
        cls._require_whole(source, model, found)
        model.restore(Path(source))
        return (model, found) if wants_info else model

    def restore(self, directory: Path) -> None:
        """Take from a directory what lies there beside the weights; most models have nothing else."""

    @classmethod
    def _require_own_kind(cls, source: str, config: Any = None, **kwargs: Any) -> None:
        if isinstance(config, PreTrainedConfig):
            settings = config.to_dict()
        else:
            where = {name: kwargs[name] for name in _WHERE if name in kwargs}
            settings, _ = PreTrainedConfig.get_config_dict(config or source, **where)
        wanted = getattr(cls.config_class, "model_type", "")
        if settings.get("model_type") != wanted:
            raise ConfigError(
                f"{source} holds a model of type {settings.get('model_type')!r}, expected {wanted!r}; load it with "
                "AutoModel.from_pretrained, or choose another directory"
            )

    @classmethod
    def _require_whole(cls, source: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
        wrong = [f"{name} is missing" for name in sorted(found["missing_keys"])]
        wrong += [f"{name} is unknown" for name in sorted(found["unexpected_keys"])]
        wrong += [
            f"{name} has shape {tuple(got)}, expected {tuple(want)}" for name, got, want in found["mismatched_keys"]
        ]
        if not wrong:
            wrong = [f"{name} is not finite" for name, value in model.state_dict().items() if not _is_finite(value)]
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise DataError(
                f"the weights in {source} do not fit {cls.__name__}: {'; '.join(wrong[:_SHOWN])}{more}. They belong to "
                "another config or were damaged"
            )


@torch.no_grad()
def init_by_fan_in(module: nn.Module) -> None:
    """A Linear keeps the variance of what it reads, a LayerNorm gives it as it is, both without bias.

    Other modules are left alone.
    """
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        init.zeros_(module.bias)


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
