"""RT-1: a short history of camera images and an instruction to binned actions, one transformer pass a decision.

Source: Brohan et al. 2022, "RT-1: Robotics Transformer for Real-World Control at Scale", section 5.

Shapes: B batch, T steps, N tokens a step, S action slots a step, D width, A action, L sequence.
"""

from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.film import FiLM
from vla_dist.models.fusion import FusionType, MultimodalFusion
from vla_dist.models.heads import bins_loss, discrete_loss, from_bins
from vla_dist.models.language_encoder import MINILM, LanguageEncoder
from vla_dist.models.pretrained import init_by_fan_in
from vla_dist.models.rt1.transformer import DecoderLayer
from vla_dist.models.settings import build_config
from vla_dist.models.token_learner import TokenLearner
from vla_dist.models.transformer import attention_bias
from vla_dist.models.visual_encoder import build_visual_encoder
from vla_dist.models.visuomotor import ONE_CAMERA, VisuomotorConfig, VisuomotorModel, Words


class RT1Config(VisuomotorConfig):
    """Everything the constructor needs, as plain JSON; see VisuomotorConfig for what it shares with others.

    Attributes:
        head: ``bins`` (each dimension one token of ``num_bins`` values) or ``discrete`` (one token of A choices).
        hidden_dim: D.
        head_dim: width of each attention head.
        tokens_per_frame: tokens that TokenLearner leaves of each image; with ``fusion`` one stands for all images.
        conditioning: ``film`` lets the words modulate a convolutional backbone, as in the paper; ``fusion`` fuses the
            tokens of any backbone with those of the words into one token a step.
        fusion_type: how, where ``conditioning`` is ``fusion``.
    """

    model_type = "vla_rt1"

    context_steps: int = 6
    head: str = "bins"
    hidden_dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    head_dim: int = 128
    dropout: float = 0.1
    tokens_per_frame: int = 8
    num_bins: int = 256
    conditioning: str = "film"
    fusion_type: str = "cross_attention"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.require("head", ("bins", "discrete"))
        self.require("conditioning", ("film", "fusion"))
        self.require("fusion_type", get_args(FusionType))
        for name in ("hidden_dim", "n_layers", "n_heads", "head_dim", "tokens_per_frame"):
            if getattr(self, name) < 1:
                raise ConfigError(f"RT-1 {name} {getattr(self, name)} must be at least 1")
        if self.num_bins < 2 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"RT-1 num_bins {self.num_bins} must be at least 2, dropout {self.dropout} in [0, 1)")
        if self.horizon != 1:
            raise ConfigError(f"RT-1 decides one action at a time; horizon {self.horizon} must be 1")
        if not self.cameras:
            raise ConfigError("RT-1 needs a camera; give the robot one, or choose a model that acts on proprio alone")
        if not self.reads_words:
            raise ConfigError("RT-1 follows words; set goal_dim or language")


class RT1(VisuomotorModel):
    """Action tokens see image tokens only, so that all dimensions of an action come out of one pass."""

    config_class = RT1Config
    config: RT1Config
    base_model_prefix = "rt1"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012

    def __init__(
        self,
        visual_model_name: str | RT1Config = "efficientnet-b3",
        language_model_name: str = MINILM,
        action_dim: int = 7,
        hidden_dim: int = 512,
        *,
        visual_weights: bool | str = False,
        language_weights: bool | str = False,
        **settings: Any,
    ) -> None:
        """Build from names, or from a config given in the first place.

        Args:
            visual_model_name: a backbone of VisualEncoder; ``vit`` is fused with the words, others are modulated by
                them.
            language_model_name: the default is a frozen sentence model outside of this one, as in the paper; any other
                becomes a LanguageEncoder that learns with the rest.
            visual_weights: where to take the backbone's weights from, as VisualEncoder's ``pretrained``.
            language_weights: where to take the language encoder's weights from.
            settings: any further field of RT1Config.
        """
        if isinstance(visual_model_name, RT1Config):
            config = visual_model_name
        else:
            settings.setdefault("conditioning", "fusion" if visual_model_name == "vit" else "film")
            settings.setdefault("cameras", [ONE_CAMERA])
            norm = "frozen" if visual_weights else "group"
            visual = {"backbone": visual_model_name, "batch_norm": norm, **(settings.pop("visual", None) or {})}
            if language_model_name != MINILM:
                settings.setdefault("goal_dim", 0)
                settings.setdefault("language", {"model_name": language_model_name, "freeze": False})
            config = build_config(RT1Config, settings, action_dim=action_dim, hidden_dim=hidden_dim, visual=visual)
        super().__init__(config)
        width, by_film = config.hidden_dim, config.conditioning == "film"
        # The encoder's projection is the paper's 1x1 convolution to D channels.
        condition = self.words_dim if by_film else 0
        self.visual = build_visual_encoder(config.visual, output_dim=width, return_tokens=True, condition_dim=condition)
        self.film = FiLM(self.words_dim, width) if by_film else None
        self.token_learner = TokenLearner(width, config.tokens_per_frame) if by_film else None
        self.fusion = None
        if not by_film:
            heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
            self.fusion = MultimodalFusion(
                width, width, config.fusion_type, language_dim=self.words_dim, num_heads=heads
            )
        self.embed_state = nn.Linear(config.state_dim, width) if config.state_dim else None
        self.embed_token = nn.Linear(width, width)
        self.embed_position = nn.Embedding(config.context_steps * (self.num_tokens + self.num_slots), width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, config.n_heads, config.head_dim, config.dropout) for _ in range(config.n_layers)
        )
        self.head = nn.Linear(width, config.action_dim if config.head == "discrete" else config.num_bins)
        self.post_init()
        if visual_weights:
            self.visual.load_backbone(visual_weights)
        if language_weights and isinstance(self.language, LanguageEncoder):
            self.language.load_trunk(language_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FiLM):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        else:
            init_by_fan_in(module)

    @property
    def num_frame_tokens(self) -> int:
        """Image tokens a step."""
        cameras = len(self.config.cameras or ())
        return 1 if self.config.conditioning == "fusion" else self.config.tokens_per_frame * cameras

    @property
    def num_tokens(self) -> int:
        """N: image tokens, and one for proprio where it is used."""
        return self.num_frame_tokens + (1 if self.config.state_dim else 0)

    @property
    def num_slots(self) -> int:
        """S: one for each dimension of an action, or one for a choice."""
        return 1 if self.config.head == "discrete" else self.config.action_dim

    def token_names(self) -> list[tuple[str, int | None]]:
        """Kind and step of each token of a training window, the newest step 0, the one before -1."""
        kinds = [f"image {index}" for index in range(self.num_frame_tokens)]
        kinds += ["proprio"] * (self.num_tokens - self.num_frame_tokens)
        kinds += [f"action {index}" for index in range(self.num_slots)]
        return [(kind, step) for step in range(1 - self.config.context_steps, 1) for kind in kinds]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return (self.num_frame_tokens, self.config.hidden_dim)

    def encode_frames(self, images: Mapping[str, Tensor], words: Words | None) -> Tensor:
        """camera name -> (B, T, 3, H, W), to (B, T, tokens, D)."""
        assert words is not None
        views = self._views(images)
        if self.film is not None and self.token_learner is not None:
            said, learned = words.pooled, []
            for frames in views.values():
                tokens = self.visual(frames, said)
                batch, steps = tokens.shape[:2]
                modulated = self.film(tokens.flatten(0, 1).transpose(1, 2), said.repeat_interleave(steps, 0))
                learned.append(self.token_learner(modulated.transpose(1, 2)).unflatten(0, (batch, steps)))
            return torch.cat(learned, 2)
        tokens = torch.cat([self.visual(frames) for frames in views.values()], 2)
        batch, steps = tokens.shape[:2]
        heard = words.repeated(steps)
        fused = cast(nn.Module, self.fusion)(tokens.flatten(0, 1), heard.tokens, language_mask=heard.mask)
        return fused.view(batch, steps, 1, -1)

    def decide(
        self,
        states: Tensor,
        features: Tensor,
        words: Words | None,
        valid: Tensor,
        generator: np.random.Generator | None = None,
    ) -> Tensor:
        """(B, 1, A): centres of the likeliest bins, or logits."""
        return self.act_from(self.slot_logits(states, features, valid)[:, -1])[:, None]

    def act_from(self, logits: Tensor) -> Tensor:
        """(B, S, choices) logits of one step to (B, A): centres of the likeliest bins, or the logits of the choice."""
        if self.config.head == "discrete":
            return logits[:, 0]
        return from_bins(logits.argmax(-1), self.config.num_bins)

    def slot_logits(
        self, states: Tensor, features: Tensor, valid: Tensor, *, every_step: bool = False, num_slots: int | None = None
    ) -> Tensor:
        """What the action slots say.

        Args:
            states: (B, T, P) raw.
            features: (B, T, tokens, D) from ``encode_frames``.
            valid: (B, T) bool.
            every_step: the slots of all steps, as in training; else the newest step's alone, which nobody else sees.
            num_slots: the first this many of each step; None: all.

        Returns:
            (B, T or 1, slots, bins or A).
        """
        batch, steps = valid.shape
        if steps > self.config.context_steps:
            raise DataError(f"{steps} steps exceed RT-1's context_steps {self.config.context_steps}")
        slots = self.num_slots if num_slots is None else num_slots
        tokens = features
        if self.embed_state is not None:
            tokens = torch.cat([tokens, self.embed_state(self.proprio_of(states))[:, :, None]], 2)
        tokens = self.embed_token(tokens)
        # Steps are counted back from the newest one, so that what is padded on the left shifts nothing.
        table = self.embed_position.weight.unflatten(0, (self.config.context_steps, -1))[-steps:]
        tokens = tokens + table[:, : self.num_tokens]
        # The published code feeds zeros in place of past actions: a slot is its position.
        queries = table[:, self.num_tokens : self.num_tokens + slots].expand(batch, -1, -1, -1)
        tokens = tokens.to(queries.dtype)
        place = torch.arange(self.num_tokens + slots, device=valid.device)
        if every_step:
            hidden = torch.cat([tokens, queries], 2).flatten(1, 2)
            is_slot = (place >= self.num_tokens).repeat(steps)
            seen = valid.repeat_interleave(len(place), 1)
        else:
            hidden = torch.cat([tokens.flatten(1, 2), queries[:, -1]], 1)
            is_slot = torch.arange(hidden.shape[1], device=valid.device) >= steps * self.num_tokens
            seen = torch.cat([valid.repeat_interleave(self.num_tokens, 1), valid[:, -1:].expand(-1, slots)], 1)
        bias = attention_bias(_visibility(is_slot, seen), hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        if every_step:
            return self.head(hidden.unflatten(1, (steps, -1))[:, :, self.num_tokens :])
        return self.head(hidden[:, -slots:][:, None])

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the actions of all valid steps against ``target_actions``."""
        words = self.understand_batch(batch)
        features = self.encode_frames(batch.images, words)
        logits = self.slot_logits(batch.states, features, batch.padding_mask, every_step=True)
        targets = (batch.target_actions, batch.padding_mask, batch.weights_of_steps)
        if self.config.head == "discrete":
            loss, metrics = discrete_loss(logits[:, :, 0], *targets)
        else:
            loss, metrics = bins_loss(logits, *targets)
        return loss, {"loss": loss.detach(), **metrics}

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: valid steps."""
        return batch.padding_mask.sum().float()


def token_by_token(model: RT1, states: Tensor, features: Tensor, valid: Tensor) -> Tensor:
    """(B, A) as ``decide`` gives, by as many passes as the action has dimensions, each with one more slot.

    This is how an autoregressive decoder would act, for comparison: slot i of pass i stands after i decoded ones.
    """
    slots = [
        model.slot_logits(states, features, valid, num_slots=index + 1)[:, -1, -1] for index in range(model.num_slots)
    ]
    return model.act_from(torch.stack(slots, 1))


def _visibility(is_slot: Tensor, valid: Tensor) -> Tensor:
    """(L,) and (B, L) to (B, 1, L, L): image tokens are seen by what follows them, action slots by themselves alone."""
    length = len(is_slot)
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)
    earlier = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril() & ~is_slot
    return ((earlier & valid[:, None, :]) | itself)[:, None]


AutoConfig.register(RT1Config.model_type, RT1Config, exist_ok=True)
AutoModel.register(RT1Config, RT1, exist_ok=True)
