"""BC-Z: one image and an instruction to the next ten waypoints.

Source: Jang et al. 2021, "BC-Z: Zero-Shot Task Generalization with Robotic Imitation Learning", sections 4 and 5.

Shapes: B batch, T steps (1), D features, A action, H waypoints.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.bcz.clip import ClipText, ClipVision, load_clip
from vla_dist.models.bcz.waypoints import WaypointHead, two_layers
from vla_dist.models.heads import DiscreteHead
from vla_dist.models.language_encoder import MINILM, LanguageEncoder
from vla_dist.models.settings import build_config
from vla_dist.models.visual_encoder import VisualEncoder, build_visual_encoder
from vla_dist.models.visuomotor import ONE_CAMERA, VisuomotorConfig, VisuomotorModel, Words

CLIP_HUB_NAME = "openai/clip-vit-base-patch32"


class BCZConfig(VisuomotorConfig):
    """Everything the constructor needs, as plain JSON; see VisuomotorConfig for what it shares with others.

    Attributes:
        head: ``waypoints`` or ``discrete``.
        visual: the backbone that words modulate by FiLM; not used with ``clip``.
        clip: settings of CLIP's ``vision`` and ``text`` towers; then image and text embeddings are concatenated. None:
            FiLM.
        xyz_dims: dimensions of the action that are positions. Where none of the three lists is given, seven dimensions
            are 3 positions, 3 rotations and a gripper, and any other number are positions.
        rotation_dims: those that are rotations.
        gripper_dims: those that open and close.
        hidden_dim: width of the two hidden layers of each part of the head.
    """

    model_type = "vla_bcz"

    horizon: int = 10
    head: str = "waypoints"
    clip: dict[str, Any] | None = None
    xyz_dims: list[int] | None = None
    rotation_dims: list[int] | None = None
    gripper_dims: list[int] | None = None
    hidden_dim: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.require("head", ("waypoints", "discrete"))
        if self.hidden_dim < 1:
            raise ConfigError(f"BC-Z hidden_dim {self.hidden_dim} must be at least 1")
        if self.context_steps != 1:
            raise ConfigError(f"BC-Z remembers nothing; context_steps {self.context_steps} must be 1")
        if not self.cameras:
            raise ConfigError("BC-Z needs a camera; give the robot one, or choose a model that acts on proprio alone")
        if self.clip is not None and (self.goal_dim or self.language is not None):
            raise ConfigError("BC-Z with CLIP reads texts by CLIP; set goal_dim 0 and no language")
        if not self.reads_words:
            raise ConfigError("BC-Z follows words; set goal_dim, language or clip")
        if self.head == "waypoints":
            self._settle_parts()

    def _settle_parts(self) -> None:
        if self.xyz_dims is None and self.rotation_dims is None and self.gripper_dims is None:
            parts = ([0, 1, 2], [3, 4, 5], [6]) if self.action_dim == 7 else (list(range(self.action_dim)), [], [])
            self.xyz_dims, self.rotation_dims, self.gripper_dims = parts
        found = [index for dims in self.parts().values() for index in dims]
        if sorted(found) != list(range(self.action_dim)):
            raise ConfigError(
                f"BC-Z xyz_dims {self.xyz_dims}, rotation_dims {self.rotation_dims} and gripper_dims "
                f"{self.gripper_dims} must name each of 0..{self.action_dim - 1} once"
            )

    @property
    def reads_words(self) -> bool:
        return self.clip is not None or super().reads_words

    def parts(self) -> dict[str, list[int]]:
        """part -> its dimensions."""
        named = {"xyz": self.xyz_dims, "rotation": self.rotation_dims, "gripper": self.gripper_dims}
        return {name: list(dims or []) for name, dims in named.items()}


class BCZ(VisuomotorModel):
    """Remembers nothing; its policy decides from the newest frame alone."""

    config_class = BCZConfig
    config: BCZConfig
    base_model_prefix = "bcz"

    def __init__(
        self,
        visual_backbone: str | BCZConfig = "resnet18",
        language_backbone: str = MINILM,
        action_dim: int = 7,
        *,
        visual_weights: bool | str = False,
        language_weights: bool | str = False,
        **settings: Any,
    ) -> None:
        """Build from names, or from a config given in the first place.

        Args:
            visual_backbone: a convolutional backbone of VisualEncoder, or ``clip`` for both towers of CLIP-B/32.
            language_backbone: the default is a frozen sentence model outside of this one, as in the paper; any other
                becomes a LanguageEncoder that learns with the rest. Without meaning for ``clip``.
            visual_weights: where to take the backbone's, or both towers', weights from; True: their usual hub name.
            language_weights: where to take the language encoder's weights from.
            settings: any further field of BCZConfig.
        """
        if isinstance(visual_backbone, BCZConfig):
            config = visual_backbone
        else:
            settings.setdefault("cameras", [ONE_CAMERA])
            if visual_backbone == "clip":
                settings = {"clip": {}, "goal_dim": 0, **settings}
            else:
                norm = "frozen" if visual_weights else "group"
                chosen = {"backbone": visual_backbone, "batch_norm": norm}
                settings["visual"] = {**chosen, **(settings.get("visual") or {})}
            if visual_backbone != "clip" and language_backbone != MINILM:
                settings.setdefault("goal_dim", 0)
                settings.setdefault("language", {"model_name": language_backbone, "freeze": False})
            config = build_config(BCZConfig, settings, action_dim=action_dim)
        super().__init__(config)
        self.visual: VisualEncoder | ClipVision
        if config.clip is None:
            given = {"backbone": "resnet18", **(config.visual or {})}
            self.visual = build_visual_encoder(given, condition_dim=self.words_dim)
            self.frame_dim = self.visual.config.output_dim
        else:
            self.language = ClipText(config.clip.get("text", {}))
            self.visual = ClipVision(config.clip.get("vision", {}))
            self.frame_dim = self.visual.output_dim
        features = self.frame_dim * len(config.cameras or ()) + config.state_dim
        if config.clip is not None:
            features += self.words_dim
        if config.head == "discrete":
            self.torso = two_layers(features, config.hidden_dim)
            self.head = DiscreteHead(config.hidden_dim, config.horizon, config.action_dim)
        else:
            self.torso = nn.Identity()
            self.head = WaypointHead(features, config.horizon, config.parts(), config.hidden_dim)
        self.post_init()
        if visual_weights and isinstance(self.visual, ClipVision):
            source = CLIP_HUB_NAME if visual_weights is True else str(visual_weights)
            load_clip(source, self.visual, cast(ClipText, self.language))
        elif visual_weights and isinstance(self.visual, VisualEncoder):
            self.visual.load_backbone(visual_weights)
        if language_weights and isinstance(self.language, LanguageEncoder):
            self.language.load_trunk(language_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return (self.frame_dim * len(self.config.cameras or ()),)

    def encode_frames(self, images: Mapping[str, Tensor], words: Words | None) -> Tensor:
        """camera name -> (B, T, 3, H, W), to (B, T, D)."""
        assert words is not None
        views = self._views(images).values()
        if isinstance(self.visual, ClipVision):
            return torch.cat([self.visual(frames) for frames in views], -1)
        return torch.cat([self.visual(frames, words.pooled) for frames in views], -1)

    def decide(
        self,
        states: Tensor,
        features: Tensor,
        words: Words | None,
        valid: Tensor,
        generator: np.random.Generator | None = None,
    ) -> Tensor:
        """(B, H, A): the waypoints, or logits."""
        return self.head.decode(self._torso(states, features, words), generator)

    def _torso(self, states: Tensor, features: Tensor, words: Words | None) -> Tensor:
        inputs = [features[:, -1]]
        if self.config.state_dim:
            inputs.append(self.proprio_of(states)[:, -1])
        if self.config.clip is not None and words is not None:
            inputs.append(words.pooled)
        return self.torso(torch.cat(inputs, -1))

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's loss over the waypoints that the episode still had."""
        words = self.understand_batch(batch)
        features = self._torso(batch.states, self.encode_frames(batch.images, words), words)
        loss, metrics = self.head.loss(features, batch.target_chunks, batch.chunk_mask, batch.weights_of_newest)
        return loss, {"loss": loss.detach(), **metrics}


AutoConfig.register(BCZConfig.model_type, BCZConfig, exist_ok=True)
AutoModel.register(BCZConfig, BCZ, exist_ok=True)
