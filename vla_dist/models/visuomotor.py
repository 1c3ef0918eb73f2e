"""What RT-1, BC-Z and the composed policies share: cameras and words in, chunks of actions out.

Shapes: B batch, T steps (at most K), P proprio, A action, H horizon, G goal, W language width, L language tokens.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.language_encoder import (
    MINILM,
    LanguageEncoder,
    LanguageEncoderConfig,
    language_model_path,
    mean_over_tokens,
    shared_embedder,
)
from vla_dist.models.member import require_batch, setting_types
from vla_dist.models.pretrained import WholePreTrainedModel
from vla_dist.models.scales import InputScales
from vla_dist.models.settings import build_config, require_settings
from vla_dist.models.visual_encoder import require_visual

ONE_CAMERA = "camera"
"""Name of the view where a model is built without naming any."""

Images = Tensor | Mapping[str, Tensor]


class VisuomotorConfig(PreTrainedConfig):
    """The settings that these models share, as plain JSON.

    Attributes:
        state_dim: P; 0: proprio is not used.
        action_dim: A; choices where the head is ``discrete``.
        context_steps: K, steps that the policy remembers.
        horizon: H, actions predicted at once.
        goal_dim: G of the frozen sentence embedding; 0: no such vectors.
        language_model: the sentence model that makes goal vectors of texts given in their place.
        language: settings of a LanguageEncoder that is part of the model, in place of goal vectors. With ``freeze``
            (its default) the trunk has the weights of its ``model_name``, which must be on this machine; without, it
            starts from noise and learns, unless it is given weights.
        cameras: names of the views it looks at.
        head: ``discrete`` for one-hot actions, else the continuous head's name.
        visual: settings of the VisualEncoder that all cameras share.
    """

    state_dim: int = 0
    action_dim: int = 7
    context_steps: int = 1
    horizon: int = 1
    goal_dim: int = 384
    language_model: str = MINILM
    language: dict[str, Any] | None = None
    cameras: list[str] | None = None
    head: str = "mse"
    visual: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.cameras = list(self.cameras or [])
        require_visual(self.visual)
        if self.language is not None:
            require_settings("language encoder", setting_types(LanguageEncoderConfig), self.language)
        for name in ("action_dim", "context_steps", "horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.model_type} {name} {getattr(self, name)} must be at least 1")
        for name in ("state_dim", "goal_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{self.model_type} {name} {getattr(self, name)} must not be negative")
        if self.goal_dim and self.language is not None:
            raise ConfigError(
                f"{self.model_type} has goal_dim {self.goal_dim} and a language encoder of its own; set one of them"
            )

    @property
    def reads_words(self) -> bool:
        """Whether instructions reach the model, as vectors or as texts."""
        return bool(self.goal_dim) or self.language is not None

    def require(self, name: str, allowed: Sequence[str]) -> None:
        """Raises ConfigError where the setting's value is not one of these."""
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{self.model_type} {name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Words:
    """What was said, one row a robot."""

    tokens: Tensor
    """(B, L, W)."""
    mask: Tensor
    """(B, L) bool, True = real."""

    @property
    def pooled(self) -> Tensor:
        """(B, W), the mean over real tokens."""
        return mean_over_tokens(self.tokens, self.mask)

    def repeated(self, times: int) -> "Words":
        """Each row this many times in a row."""
        return Words(
            tokens=self.tokens.repeat_interleave(times, 0),
            mask=self.mask.repeat_interleave(times, 0),
        )


class Reader(Protocol):
    """A module that turns texts into tokens, such as LanguageEncoder."""

    @property
    def output_dim(self) -> int: ...

    @property
    def tokenizer(self) -> Any: ...

    def encode_tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts to (B, L, W) and their (B, L) mask, 1 = real."""
        ...

    def restore(self, directory: Path) -> None:
        """Take the tokenizer that lies beside a checkpoint."""
        ...


class VisuomotorModel(InputScales, WholePreTrainedModel, ABC):
    """Encodes each frame once, then decides from the features of the last K steps.

    Proprio and goals are normalised inside by buffers that travel with the weights.
    """

    config: VisuomotorConfig
    main_input_name = "images"
    _supports_sdpa = True

    language: Reader | None

    def __init__(self, config: VisuomotorConfig) -> None:
        super().__init__(config)
        self.language = None
        if config.language is not None:
            self.language = LanguageEncoder(build_config(LanguageEncoderConfig, config.language))
            # A frozen trunk of noise could never be told anything.
            if self.language.config.freeze and self.language.device.type != "meta":
                self.language.load_trunk(str(language_model_path(self.language.config.model_name)))
        self.register_scales(config.state_dim, config.goal_dim)

    @property
    def words_dim(self) -> int:
        """W; 0 for a model that takes no words."""
        return self.config.goal_dim if self.language is None else self.language.output_dim

    @property
    @abstractmethod
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one step's features, without batch and time."""

    @abstractmethod
    def encode_frames(self, images: Mapping[str, Tensor], words: Words | None) -> Tensor:
        """camera name -> (B, T, 3, H, W) uint8 or float in [0, 1], to (B, T, *feature_shape).

        Each step's features depend on its own frames alone, so that a policy computes them once.
        """

    @abstractmethod
    def decide(
        self,
        states: Tensor,
        features: Tensor,
        words: Words | None,
        valid: Tensor,
        generator: np.random.Generator | None = None,
    ) -> Tensor:
        """The chunk that begins at the newest of T steps.

        Args:
            states: (B, T, P) raw; P is 0 where proprio is not used.
            features: (B, T, *feature_shape) from ``encode_frames``.
            valid: (B, T) bool; the newest step always is.
            generator: draws from the head's distribution where it has one; None: its most likely action.

        Returns:
            (B, H, A): actions in [-1, 1], or logits where the head is ``discrete``.
        """

    @abstractmethod
    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise, and detached scalars."""

    def forward(
        self,
        images: Images | None,
        text_commands: str | Sequence[str] | Tensor | None,
        states: Tensor | None = None,
    ) -> Tensor:
        """The first action of the chunk.

        Args:
            images: (B, 3, H, W) or (B, T, 3, H, W), uint8 or float in [0, 1]; by camera name where there are several,
                None where there is none.
            text_commands: B texts, one for all, or (B, G) goal vectors.
            states: (B, P) or (B, T, P), where the model looks at proprio.

        Returns:
            (B, A) in [-1, 1], or logits where the head is ``discrete``.

        Raises:
            DataError: inputs of another shape or kind than the config asks for.
        """
        if states is not None and states.ndim == 2:
            states = states[:, None]
        views = self._views({} if images is None else images)
        first = next(iter(views.values()), states)
        if first is None:
            raise DataError("this model has no cameras; give states")
        batch, steps = first.shape[:2]
        if states is None:
            states = self.proprio_mean.new_zeros(batch, steps, 0)
        words = self.understand(text_commands, batch)
        valid = torch.ones(batch, steps, dtype=torch.bool, device=self.proprio_mean.device)
        features = self.features_of(views, words, (batch, steps))
        return self.decide(states, features, words, valid)[:, 0]

    def features_of(self, images: Mapping[str, Tensor], words: Words | None, shape: tuple[int, int]) -> Tensor:
        """As ``encode_frames``; without cameras (B, T, *feature_shape) of nothing, for ``shape`` (B, T)."""
        if self.config.cameras:
            return self.encode_frames(images, words)
        return self.proprio_mean.new_zeros(*shape, *self.feature_shape)

    def understand(self, said: str | Sequence[str] | Tensor | None, num_rows: int) -> Words | None:
        """Texts, one text for all rows, or (B, G) goal vectors, to what the model reads; None where it reads nothing.

        Raises:
            DataError: as many rows as robots are needed, and words where the model has been built to hear them.
        """
        if not self.words_dim:
            return None
        if said is None:
            raise DataError("this model follows words; give texts or goal vectors")
        if not isinstance(said, Tensor):
            said = [said] * num_rows if isinstance(said, str) else list(said)
            said = said * num_rows if len(said) == 1 else said
        if len(said) != num_rows:
            raise DataError(f"{len(said)} instructions cannot lead {num_rows} rows; give one, or {num_rows}")
        if self.language is not None:
            if isinstance(said, Tensor):
                raise DataError("this model reads texts with its own language encoder; give texts, not goal vectors")
            tokens, mask = self.language.encode_tokens(said)
            return Words(tokens=tokens, mask=mask.bool())
        if not isinstance(said, Tensor):
            vectors = shared_embedder(self.config.language_model).embed(said)
            said = torch.from_numpy(vectors).to(self.goal_mean.device)
        if said.shape != (num_rows, self.config.goal_dim):
            raise DataError(f"goals of shape {tuple(said.shape)} must be ({num_rows}, {self.config.goal_dim})")
        goals = self.normalised_goals(said.to(self.goal_mean.dtype))
        return Words(tokens=goals[:, None], mask=torch.ones_like(goals[:, :1], dtype=torch.bool))

    def understand_batch(self, batch: TrainBatch) -> Words | None:
        """What a training batch says, after a check of all its shapes."""
        require_batch(batch, self.config)
        said = batch.instructions if self.language is not None else batch.goals
        return self.understand(said, batch.num_windows)

    def proprio_of(self, states: Tensor) -> Tensor:
        """(B, T, at least P) raw to (B, T, P) normalised. Raises DataError where there are fewer."""
        size = self.config.state_dim
        if states.shape[-1] < size or states.ndim != 3:
            raise DataError(f"states of shape {tuple(states.shape)} must be (B, T, {size})")
        return self.normalised(states[..., :size])

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: how many terms ``loss`` is the mean of, so that means of parts add up to that of the whole."""
        return batch.chunk_mask.sum().float()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Weights and config, and the tokenizer where the model reads texts itself."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.language is not None:
            self.language.tokenizer.save_pretrained(save_directory)

    def restore(self, directory: Path) -> None:
        """Take the tokenizer that was saved beside the weights."""
        if self.language is not None:
            self.language.restore(directory)

    def _views(self, images: Images) -> dict[str, Tensor]:
        """camera name -> (B, T, 3, H, W), in the config's order."""
        cameras = self.config.cameras or []
        if isinstance(images, Tensor):
            if len(cameras) != 1:
                raise DataError(f"this model looks at cameras {cameras}; give a dictionary of images by name")
            images = {cameras[0]: images}
        missing = [name for name in cameras if name not in images]
        if missing:
            raise DataError(f"images lack cameras {missing}; got {sorted(images) or 'none'}")
        views = {name: images[name] for name in cameras}
        views = {name: frames[:, None] if frames.ndim == 4 else frames for name, frames in views.items()}
        shapes = {tuple(frames.shape[:2]) for frames in views.values()}
        steps = self.config.context_steps
        if len(shapes) > 1 or not all(0 < shape[-1] <= steps for shape in shapes):
            raise DataError(
                f"images of {sorted(shapes)} rows and steps; all cameras need the same, and at most {steps} steps"
            )
        return views
