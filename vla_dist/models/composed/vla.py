"""Any visual encoder, any way to hear words, any fusion and any head, chosen by config.

Shapes: B batch, T steps (at most K), V cameras, N tokens a camera, D width, W language width, A action, H horizon.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.fusion import FusionType, MultimodalFusion
from vla_dist.models.heads import HEADS, build_head
from vla_dist.models.token_learner import TokenLearner
from vla_dist.models.visual_encoder import build_visual_encoder
from vla_dist.models.visuomotor import VisuomotorConfig, VisuomotorModel, Words


class ComposedVLAConfig(VisuomotorConfig):
    """Everything the constructor needs, as plain JSON; see VisuomotorConfig for what it shares with others.

    Attributes:
        head: ``mse``, ``gaussian``, ``bins``, ``flow`` or ``discrete``.
        fusion_type: ``concat``, ``cross_attention``, ``gated_fusion`` or ``film``.
        hidden_dim: D.
        fusion_heads: attention heads, where the fusion attends.
        num_goal_tokens: tokens that one goal vector becomes, so that attention over words has something to choose from.
        tokens_per_frame: tokens that TokenLearner leaves of each image; 0: one, its mean.
        visual: settings of the VisualEncoder; not used without cameras.
    """

    model_type = "vla_composed"

    hidden_dim: int = 512
    fusion_type: str = "cross_attention"
    fusion_heads: int = 8
    num_goal_tokens: int = 4
    tokens_per_frame: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.require("head", tuple(HEADS))
        self.require("fusion_type", get_args(FusionType))
        for name in ("hidden_dim", "fusion_heads", "num_goal_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"composed VLA {name} {getattr(self, name)} must be at least 1")
        if self.tokens_per_frame < 0:
            raise ConfigError(f"composed VLA tokens_per_frame {self.tokens_per_frame} must not be negative")
        if self.fusion_type == "cross_attention" and self.hidden_dim % self.fusion_heads:
            raise ConfigError(
                f"{self.fusion_heads} fusion_heads do not divide hidden_dim {self.hidden_dim}; choose a multiple"
            )
        if not self.cameras and not self.state_dim:
            raise ConfigError("a composed VLA without cameras needs proprio; set state_dim or cameras")
        if not self.reads_words:
            raise ConfigError("a composed VLA follows words; set goal_dim or language")


class ComposedVLA(VisuomotorModel):
    """Tokens of the last K steps' images and proprio, fused with the words, to a chunk of actions."""

    config_class = ComposedVLAConfig
    config: ComposedVLAConfig
    base_model_prefix = "composed"

    def __init__(self, config: ComposedVLAConfig) -> None:
        """Args:
        config: each part by its settings.

        Raises:
            ConfigError: a part that does not exist, or parts that do not fit.
        """
        super().__init__(config)
        width, steps, cameras = config.hidden_dim, config.context_steps, len(config.cameras or ())
        self.visual = self.token_learner = self.embed_camera = None
        self.embed_state = self.embed_goal = self.embed_step = None
        if cameras:
            as_tokens = config.tokens_per_frame > 0
            self.visual = build_visual_encoder(config.visual, output_dim=width, return_tokens=as_tokens)
            self.token_learner = TokenLearner(width, config.tokens_per_frame) if config.tokens_per_frame else None
            self.embed_camera = nn.Embedding(cameras, width) if cameras > 1 else None
        if config.state_dim:
            self.embed_state = nn.Linear(config.state_dim, width)
        if steps > 1:
            self.embed_step = nn.Embedding(steps, width)
        if self.language is None:
            self.embed_goal = nn.Linear(config.goal_dim, config.num_goal_tokens * width)
        self.fusion = MultimodalFusion(
            width,
            width,
            config.fusion_type,
            language_dim=width if self.language is None else self.words_dim,
            num_heads=config.fusion_heads,
        )
        self.output_norm = nn.LayerNorm(width)
        self.head = build_head(config.head, width, config.horizon, config.action_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # Actions begin near the middle, and spreads near the middle of what they may be.
            gain = 0.1 if module is getattr(self.head, "project", None) else 1.0
            init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        cameras = len(self.config.cameras or ())
        return (cameras * max(1, self.config.tokens_per_frame), self.config.hidden_dim)

    def token_names(self) -> list[tuple[str, int | None]]:
        """What visual tokens may look at in cross-attention; none of it belongs to one step."""
        num_words = self.config.num_goal_tokens if self.embed_goal is not None else 0
        return [("nothing", None), *((f"goal {index}", None) for index in range(num_words))]

    def encode_frames(self, images: Mapping[str, Tensor], words: Words | None) -> Tensor:
        """camera name -> (B, T, 3, H, W), to (B, T, tokens, D).

        Raises:
            DataError: a camera is missing, or this model has none.
        """
        if self.visual is None:
            raise DataError("this model has no cameras: it decides from proprio and words")
        found = []
        for index, frames in enumerate(self._views(images).values()):
            tokens = self.visual(frames)
            if self.token_learner is None:
                tokens = tokens[:, :, None]
            else:
                tokens = self.token_learner(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            found.append(tokens if self.embed_camera is None else tokens + self.embed_camera.weight[index])
        return torch.cat(found, 2)

    def decide(
        self,
        states: Tensor,
        features: Tensor,
        words: Words | None,
        valid: Tensor,
        generator: np.random.Generator | None = None,
    ) -> Tensor:
        """(B, H, A): actions in [-1, 1], or logits."""
        return self.head.decode(self._fused(states, features, words, valid), generator)

    def _fused(self, states: Tensor, features: Tensor, words: Words | None, valid: Tensor) -> Tensor:
        """(B, D)."""
        assert words is not None
        steps = valid.shape[1]
        tokens = features
        if self.embed_state is not None:
            tokens = torch.cat([tokens, self.embed_state(self.proprio_of(states))[:, :, None]], 2)
        if self.embed_step is not None:
            # Counted back from the newest step, so that what is padded on the left shifts nothing.
            tokens = tokens + self.embed_step.weight[-steps:, None]
        seen = valid.repeat_interleave(tokens.shape[2], 1)
        said, heard = words.tokens, words.mask
        if self.embed_goal is not None:
            said = self.embed_goal(words.pooled).unflatten(-1, (self.config.num_goal_tokens, -1))
            heard = torch.ones_like(said[..., 0], dtype=torch.bool)
        fused = self.fusion(tokens.flatten(1, 2), said, visual_mask=seen, language_mask=heard)
        return self.output_norm(fused)

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's loss over the actions that the episode still had."""
        words = self.understand_batch(batch)
        num, steps = batch.padding_mask.shape
        features = self.features_of(batch.images, words, (num, steps))
        fused = self._fused(batch.states, features, words, batch.padding_mask)
        loss, metrics = self.head.loss(fused, batch.target_chunks, batch.chunk_mask, batch.weights_of_newest)
        return loss, {"loss": loss.detach(), **metrics}


AutoConfig.register(ComposedVLAConfig.model_type, ComposedVLAConfig, exist_ok=True)
AutoModel.register(ComposedVLAConfig, ComposedVLA, exist_ok=True)
