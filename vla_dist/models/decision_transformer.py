"""Decision Transformer: the next action from returns-to-go, states, past actions and an instruction.

Source: Chen et al. 2021, "Decision Transformer", section 3 and algorithm 1; the blocks are GPT-2's.

Shapes: B batch, T steps, P proprio, A action, G goal, D width, S tokens a step (return, state, action), L tokens.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.member import fill_normaliser, masked_mean, require_batch
from vla_dist.models.transformer import ACTIVATIONS, Transformer, causal_visibility, residual_gain
from vla_dist.models.visual_encoder import VisualEncoder, VisualEncoderConfig

Head = Literal["tanh", "discrete"]
Position = Literal["window", "timestep"]
GoalFusion = Literal["prefix", "add"]
_LARGEST_NORMALISED = 10.0


class VlaDecisionTransformerConfig(PreTrainedConfig):
    """Everything the constructor needs, as plain JSON.

    Attributes:
        state_dim: P.
        action_dim: A; choices where the head is ``discrete``.
        hidden_dim: D.
        max_episode_len: size of the timestep table; later steps share its last row.
        context_steps: K, steps a policy remembers; size of the ``window`` position table.
        inner_dim: width of the MLP; None: 4 D.
        head: ``tanh`` (squared error, actions in [-1, 1]) or ``discrete`` (cross-entropy over A choices).
        position: ``window`` numbers the valid steps of the window, so a policy rebuilt from its last K observations is
            the same policy; ``timestep`` numbers the steps of the episode, as in the paper.
        goal_dim: G of the sentence embedding; 0: no language.
        goal_fusion: ``prefix`` puts goal tokens before the first step; ``add`` adds the goal to each state token.
        num_goal_tokens: prefix tokens made from one sentence embedding.
        use_returns: whether steps have a return token.
        use_previous_actions: whether steps have an action token. Without both, one token a step is left.
        action_dropout: in training, probability that an action token is hidden, each on its own: discourages copying.
        return_dropout: in training, probability that all return tokens of a window are hidden.
        cameras: names of the views that are added to the state token.
        visual: settings of the VisualEncoder shared by the cameras.
    """

    model_type = "vla_decision_transformer"

    state_dim: int = 39
    action_dim: int = 4
    hidden_dim: int = 128
    n_layers: int = 6
    n_heads: int = 8
    max_episode_len: int = 1000
    context_steps: int = 20
    inner_dim: int | None = None
    activation: str = "gelu"
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    head: str = "tanh"
    position: str = "window"
    goal_dim: int = 384
    goal_fusion: str = "prefix"
    num_goal_tokens: int = 1
    use_returns: bool = True
    use_previous_actions: bool = True
    action_dropout: float = 0.0
    return_dropout: float = 0.0
    cameras: list[str] | None = None
    visual: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.cameras = list(self.cameras or [])
        for name, value, allowed in (
            ("head", self.head, get_args(Head)),
            ("position", self.position, get_args(Position)),
            ("goal_fusion", self.goal_fusion, get_args(GoalFusion)),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in allowed:
                raise ConfigError(f"decision transformer {name} {value!r} must be one of {', '.join(allowed)}")
        for name in (
            "state_dim",
            "action_dim",
            "hidden_dim",
            "n_layers",
            "n_heads",
            "max_episode_len",
            "context_steps",
            "num_goal_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"decision transformer {name} {getattr(self, name)} must be at least 1")
        if self.hidden_dim % self.n_heads:
            raise ConfigError(f"{self.n_heads} heads do not divide hidden_dim {self.hidden_dim}; choose a multiple")
        for name in ("dropout", "action_dropout", "return_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"decision transformer {name} {getattr(self, name)} must be within [0, 1)")
        if self.goal_dim < 0:
            raise ConfigError(f"goal_dim {self.goal_dim} must be 0 (no language) or the size of an embedding")

    @property
    def horizon(self) -> int:
        """One action at a time."""
        return 1


class DecisionTransformer(PreTrainedModel):
    """Reads the action off each state token; a step sees itself and the past, never the future.

    Proprio and goals are normalised inside by buffers that ``set_normaliser`` fills, so that they travel with the
    weights.
    """

    config_class = VlaDecisionTransformerConfig
    config: VlaDecisionTransformerConfig
    base_model_prefix = "decision_transformer"
    main_input_name = "states"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    proprio_mean: Tensor
    proprio_std: Tensor
    goal_mean: Tensor
    goal_std: Tensor

    def __init__(
        self,
        state_dim: int | VlaDecisionTransformerConfig,
        action_dim: int | None = None,
        hidden_dim: int = 128,
        n_layers: int = 6,
        n_heads: int = 8,
        max_episode_len: int = 1000,
        **settings: Any,
    ) -> None:
        """Build from dimensions, or from a config given in the first place.

        Args:
            settings: any further field of VlaDecisionTransformerConfig.
        """
        if isinstance(state_dim, VlaDecisionTransformerConfig):
            config = state_dim
        else:
            if action_dim is None:
                raise ConfigError("DecisionTransformer needs action_dim beside state_dim, or one config")
            known = VlaDecisionTransformerConfig.__annotations__
            unknown = sorted(set(settings) - set(known))
            if unknown:
                raise ConfigError(f"DecisionTransformer does not know {unknown}; its settings are {', '.join(known)}")
            config = VlaDecisionTransformerConfig(
                state_dim=state_dim,
                action_dim=action_dim,
                hidden_dim=hidden_dim,
                n_layers=n_layers,
                n_heads=n_heads,
                max_episode_len=max_episode_len,
                **settings,
            )
        super().__init__(config)
        width = config.hidden_dim
        self.embed_state = nn.Linear(config.state_dim, width)
        self.embed_return = nn.Linear(1, width) if config.use_returns else None
        self.embed_action = nn.Linear(config.action_dim, width) if config.use_previous_actions else None
        self.embed_position = nn.Embedding(
            config.context_steps if config.position == "window" else config.max_episode_len, width
        )
        prefix = config.num_goal_tokens if config.goal_fusion == "prefix" else 1
        self.embed_goal = nn.Linear(config.goal_dim, prefix * width) if config.goal_dim else None
        self.visual = self.embed_views = None
        if config.cameras:
            self.visual = VisualEncoder(VisualEncoderConfig(**(config.visual or {})))
            features = self.visual.config.output_dim
            self.embed_views = nn.ModuleList(nn.Linear(features, width) for _ in config.cameras)
        self.embed_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = Transformer(
            dim=width,
            num_layers=config.n_layers,
            num_heads=config.n_heads,
            inner_dim=config.inner_dim or 4 * width,
            activation=config.activation,
            dropout=config.dropout,
            eps=config.layer_norm_eps,
        )
        self.head = nn.Linear(width, config.action_dim)
        self.register_buffer("proprio_mean", torch.zeros(config.state_dim))
        self.register_buffer("proprio_std", torch.ones(config.state_dim))
        self.register_buffer("goal_mean", torch.zeros(config.goal_dim))
        self.register_buffer("goal_std", torch.ones(config.goal_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Unit-variance embeddings, shrunk residual branches, and a head that starts near zero."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Transformer):
            gain = residual_gain(self.config.n_layers)
            for name, weight in module.named_parameters():
                if name.endswith(("out.weight", "narrow.weight")):
                    init.normal_(weight, std=gain * weight.shape[1] ** -0.5)
        elif module is self:
            init.normal_(self.head.weight, std=0.02)

    def set_normaliser(
        self,
        *,
        proprio_mean: Tensor,
        proprio_std: Tensor,
        goal_mean: Tensor | None = None,
        goal_std: Tensor | None = None,
    ) -> None:
        """Fill the buffers. A dimension that never moved (std near 0) keeps its scale.

        Raises:
            DataError: a shape differs from the config, or a number is not finite.
        """
        fill_normaliser(
            self, proprio_mean=proprio_mean, proprio_std=proprio_std, goal_mean=goal_mean, goal_std=goal_std
        )

    def encode_images(self, images: Mapping[str, Tensor]) -> Tensor:
        """camera name -> (B, T, 3, H, W) uint8 or float in [0, 1], to the (B, T, D) that state tokens gain."""
        if self.visual is None or self.embed_views is None:
            raise DataError("this decision transformer was built without cameras; pass no images")
        cameras = self.config.cameras or []
        missing = [name for name in cameras if name not in images]
        if missing:
            raise DataError(f"images lack cameras {missing}; got {sorted(images)}")
        views = [embed(self.visual(images[name])) for name, embed in zip(cameras, self.embed_views, strict=True)]
        return torch.stack(views).sum(0)

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        goals: Tensor | None,
        timesteps: Tensor,
        attention_mask: Tensor | None = None,
        *,
        images: Mapping[str, Tensor] | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Predict every step's action from what came before it.

        Args:
            states: (B, T, P) float32, raw units.
            actions: (B, T, A) float32, in [-1, 1] or one-hot; the last one may be anything.
            returns_to_go: (B, T) or (B, T, 1) float32, scaled.
            goals: (B, G) float32; None where ``goal_dim`` is 0.
            timesteps: (B, T) int64, clamped to the table.
            attention_mask: (B, T), 1 or True = valid; None: all valid.
            images: camera name -> (B, T, 3, H, W).
            image_features: (B, T, D) from ``encode_images``, in place of ``images``.

        Returns:
            (B, T, A): actions in [-1, 1] (``tanh``) or logits (``discrete``). Padded steps are finite, not meaningful.
        """
        batch, steps = states.shape[:2]
        valid = torch.ones(batch, steps, dtype=torch.bool, device=states.device)
        if attention_mask is not None:
            valid = attention_mask.bool()
        position = self._positions(timesteps, valid)
        goal = self._goal_tokens(goals, batch)
        if image_features is None and images:
            image_features = self.encode_images(images)
        state = self._state_tokens(states, image_features)
        if self.config.goal_fusion == "add" and goal is not None:
            state = state + goal
            goal = None
        tokens, is_key, state_index = [state + position], [valid], 0
        if self.embed_return is not None:
            tokens.insert(0, self.embed_return(returns_to_go.reshape(batch, steps, 1)) + position)
            is_key.insert(0, valid & self._kept((batch, 1), self.config.return_dropout, valid.device))
            state_index = 1
        if self.embed_action is not None:
            tokens.append(self.embed_action(actions) + position)
            is_key.append(valid & self._kept((batch, steps), self.config.action_dropout, valid.device))
        sequence = self.embed_norm(torch.stack(tokens, 2).flatten(1, 2))
        keys = torch.stack(is_key, 2).flatten(1, 2)
        prefix = 0
        if goal is not None:
            prefix = goal.shape[1]
            sequence = torch.cat([self.embed_norm(goal), sequence], 1)
            keys = torch.cat([torch.ones(batch, prefix, dtype=torch.bool, device=keys.device), keys], 1)
        wanted = slice(prefix + state_index, None, len(tokens))
        output = self.head(self.transformer(sequence, causal_visibility(keys), read=wanted))
        return output.tanh() if self.config.head == "tanh" else output

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over all valid steps of the squared error or of the cross-entropy against ``target_actions``.

        The metrics are detached scalars on the model's device, so that reading them may wait.

        Raises:
            DataError: the batch is of another robot or another model.
        """
        require_batch(batch, self.config)
        output = self(
            batch.states,
            batch.actions,
            batch.returns_to_go,
            batch.goals,
            batch.timesteps,
            batch.padding_mask,
            images=batch.images,
        )
        target, valid = batch.target_actions, batch.padding_mask
        if self.config.head == "discrete":
            choice = target.argmax(-1)
            terms = cross_entropy(output.transpose(1, 2), choice, reduction="none")
            metrics = {"accuracy": masked_mean((output.argmax(-1) == choice).float(), valid)}
        else:
            terms = (output - target).square().mean(-1)
            metrics = {"action_error": masked_mean((output.detach() - target).abs().mean(-1), valid)}
        loss = masked_mean(terms, valid, batch.weights)
        return loss, {"loss": loss.detach(), **metrics}

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: how many terms ``loss`` is the mean of, so that means of parts add up to that of the whole."""
        return batch.padding_mask.sum().float()

    def _positions(self, timesteps: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D). In ``window`` a step's number is how many valid steps precede it: padding shifts nothing."""
        if self.config.position == "window":
            if valid.shape[1] > self.config.context_steps:
                raise DataError(
                    f"{valid.shape[1]} steps exceed context_steps {self.config.context_steps}; "
                    "give a shorter window or position='timestep'"
                )
            index = valid.long().cumsum(1) - 1
        else:
            index = timesteps
        return self.embed_position(index.clamp(0, self.embed_position.num_embeddings - 1))

    def _state_tokens(self, states: Tensor, image_features: Tensor | None) -> Tensor:
        normalised = (states - self.proprio_mean) / self.proprio_std
        # A reading far outside the training data must not drown every other input.
        token = self.embed_state(normalised.clamp(-_LARGEST_NORMALISED, _LARGEST_NORMALISED))
        if (image_features is None) != (self.visual is None):
            has = "has" if image_features is None else "has no"
            raise DataError(f"this decision transformer {has} cameras {self.config.cameras}; match its images to them")
        return token if image_features is None else token + image_features

    def _goal_tokens(self, goals: Tensor | None, batch: int) -> Tensor | None:
        if (goals is None) != (self.embed_goal is None):
            raise DataError(
                f"goal_dim is {self.config.goal_dim} but goals are {'absent' if goals is None else 'given'}"
            )
        if goals is None or self.embed_goal is None:
            return None
        normalised = (goals - self.goal_mean) / self.goal_std
        return self.embed_goal(normalised).view(batch, -1, self.config.hidden_dim)

    def _kept(self, shape: tuple[int, int], dropout: float, device: torch.device) -> Tensor:
        if not (self.training and dropout):
            return torch.ones(shape, dtype=torch.bool, device=device)
        return torch.rand(shape, device=device) >= dropout


AutoConfig.register(VlaDecisionTransformerConfig.model_type, VlaDecisionTransformerConfig, exist_ok=True)
AutoModel.register(VlaDecisionTransformerConfig, DecisionTransformer, exist_ok=True)
