"""Decision Transformer: the next action from returns-to-go, states, past actions and an instruction.

Source: Chen et al. 2021, "Decision Transformer", section 3 and algorithm 1; the blocks are GPT-2's.

Shapes: B batch, T steps, P proprio, A action, G goal, D width, S tokens a step (return, state, action), O outputs of
the head a step, C tokens of which keys and values are kept.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.decision_transformer_config import VlaDecisionTransformerConfig
from vla_dist.models.heads import from_bins, to_bins
from vla_dist.models.member import fill_normaliser, masked_mean, require_batch
from vla_dist.models.squashed_gaussian import SquashedGaussian
from vla_dist.models.transformer import ResidualLinear, Transformer, causal_visibility, residual_gain
from vla_dist.models.visual_encoder import VisualEncoder, VisualEncoderConfig

_LARGEST_NORMALISED = 10.0


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

    tokens_per_step: int
    """S: the state, the return and the action where there are such."""
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
        self.tokens_per_step = 1 + config.use_returns + config.use_previous_actions
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
        self.head = nn.Linear(width, config.num_outputs)
        self.register_buffer("proprio_mean", torch.zeros(config.state_dim))
        self.register_buffer("proprio_std", torch.ones(config.state_dim))
        self.register_buffer("goal_mean", torch.zeros(config.goal_dim))
        self.register_buffer("goal_std", torch.ones(config.goal_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Unit-variance embeddings, shrunk residual branches, and a head that starts near zero."""
        # Only modules with parameters of their own come here.
        if isinstance(module, nn.Linear):
            gain = residual_gain(self.config.n_layers) if isinstance(module, ResidualLinear) else 1.0
            init.normal_(module.weight, std=0.02 if module is self.head else gain * module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

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
            (B, T, A): actions in [-1, 1], or logits where the head is ``discrete``. Padded steps are finite, not
            meaningful.
        """
        steps = (states, actions, returns_to_go, goals, timesteps, attention_mask)
        return self.actions_from(self.outputs(*steps, images=images, image_features=image_features))

    def actions_from(self, outputs: Tensor, noise: Tensor | None = None) -> Tensor:
        """(..., O) outputs of the head to (..., A) likeliest actions in [-1, 1], or to logits (``discrete``).

        Args:
            noise: (..., A) standard normal: draws from the distribution of a ``gaussian`` head.
        """
        if self.config.head == "tanh":
            return outputs.tanh()
        if self.config.head == "gaussian":
            distribution = SquashedGaussian.of(outputs)
            return distribution.mode() if noise is None else distribution.sample(noise)
        if self.config.head == "bins":
            return from_bins(self._bin_logits(outputs).argmax(-1), self.config.num_bins)
        return outputs

    def outputs(
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
        """The arguments of ``forward`` to the (B, T, O) outputs of the head that its actions are made from."""
        if image_features is None and images:
            image_features = self.encode_images(images)
        sequence, is_key, first = self._sequence(
            states, actions, returns_to_go, goals, timesteps, attention_mask, image_features
        )
        wanted = slice(first, None, self.tokens_per_step)
        return self.head(self.transformer(sequence, causal_visibility(is_key), read=wanted))

    def newest(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        goals: Tensor | None,
        timesteps: Tensor,
        attention_mask: Tensor,
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read windows of which only the newest action is wanted; for the arguments see ``forward``.

        Returns:
            (B, O) outputs of the last step, and (num_layers, 2, B, C, D) keys and values of the goal's tokens and of
            the T steps up to the last state token, which ``extend`` takes.
        """
        sequence, is_key, _ = self._sequence(
            states, actions, returns_to_go, goals, timesteps, attention_mask, image_features
        )
        if self.embed_action is not None:
            sequence, is_key = sequence[:, :-1], is_key[:, :-1]
        cache = sequence.new_empty(self.config.n_layers, 2, *sequence.shape)
        hidden = self.transformer(sequence, causal_visibility(is_key), read=slice(-1, None), cache=cache)
        return self.head(hidden[:, 0]), cache

    def extend(
        self,
        cache: Tensor,
        is_key: Tensor,
        *,
        state: Tensor,
        previous_action: Tensor,
        return_to_go: Tensor,
        goals: Tensor | None,
        timestep: Tensor,
        num_before: Tensor,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Read one more step of windows whose earlier steps are in the cache: equal to reading them whole.

        Args:
            cache: (num_layers, 2, B, C + S, D); the last S places are free and are written.
            is_key: (B, C) bool, True where there is a token.
            state: (B, P), raw units.
            previous_action: (B, A), the executed one of the newest step in the cache.
            return_to_go: (B,), scaled.
            goals: (B, G), as when the cache was made.
            timestep: (B,) int64, of the new step.
            num_before: (B,) int64, steps in the cache, at least one and fewer than K.
            image_features: (B, D).

        Returns:
            (B, O).
        """
        batch, size = len(state), self.tokens_per_step
        at = num_before if self.config.position == "window" else timestep
        position = self._rows_of_table(at)
        token = self._state_tokens(state, image_features) + position
        if self.config.goal_fusion == "add" and goals is not None:
            token = token + cast(Tensor, self._goal_tokens(goals, batch))[:, 0]
        tokens = [token]
        if self.embed_return is not None:
            tokens.insert(0, self.embed_return(return_to_go[:, None]) + position)
        if self.embed_action is not None:
            tokens.insert(0, self.embed_action(previous_action) + self._rows_of_table(at - 1))
        new = torch.ones(batch, size, size, dtype=torch.bool, device=is_key.device).tril()
        visible = torch.cat([is_key[:, None].expand(-1, size, -1), new], 2)[:, None]
        sequence = self.embed_norm(torch.stack(tokens, 1))
        return self.head(self.transformer(sequence, visible, read=slice(-1, None), cache=cache)[:, 0])

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over all valid steps of what the head minimises against ``target_actions``.

        That is the squared error (``tanh``), the cross-entropy (``bins``, ``discrete``) or the negative log likelihood
        (``gaussian``). The metrics are detached scalars on the model's device, so that reading them may wait.

        Raises:
            DataError: the batch is of another robot or another model.
        """
        terms, measured = self._terms(self.outputs_of(batch), batch.target_actions)
        loss = masked_mean(terms, batch.padding_mask, batch.weights_of_steps)
        metrics = {name: masked_mean(value.detach(), batch.padding_mask) for name, value in measured.items()}
        return loss, {"loss": loss.detach(), **metrics}

    def outputs_of(self, batch: TrainBatch) -> Tensor:
        """(B, K, O), as ``outputs``, of a training batch. Raises DataError where it does not fit."""
        require_batch(batch, self.config)
        steps = (batch.states, batch.actions, batch.returns_to_go, batch.goals, batch.timesteps, batch.padding_mask)
        return self.outputs(*steps, images=batch.images)

    def _terms(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T) terms of the loss and (B, T) things to report, of (B, T, O) outputs and (B, T, A) targets."""
        if self.config.head == "discrete":
            choice = target.argmax(-1)
            terms = cross_entropy(outputs.transpose(1, 2), choice, reduction="none")
            return terms, {"accuracy": (outputs.argmax(-1) == choice).float()}
        measured = {"action_error": (self.actions_from(outputs) - target).abs().mean(-1)}
        if self.config.head == "tanh":
            return (outputs.tanh() - target).square().mean(-1), measured
        if self.config.head == "bins":
            logits, bins = self._bin_logits(outputs), to_bins(target, self.config.num_bins)
            terms = cross_entropy(logits.movedim(-1, 1), bins, reduction="none").mean(-1)
            return terms, {**measured, "accuracy": (logits.argmax(-1) == bins).float().mean(-1)}
        distribution = SquashedGaussian.of(outputs.float())
        surprise = -distribution.log_prob(target)
        return surprise, {**measured, "surprise": surprise, "entropy": distribution.entropy()}

    def _bin_logits(self, outputs: Tensor) -> Tensor:
        """(..., O) to (..., A, num_bins)."""
        return outputs.unflatten(-1, (self.config.action_dim, self.config.num_bins))

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: how many terms ``loss`` is the mean of, so that means of parts add up to that of the whole."""
        return batch.padding_mask.sum().float()

    def _sequence(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        goals: Tensor | None,
        timesteps: Tensor,
        attention_mask: Tensor | None,
        image_features: Tensor | None,
    ) -> tuple[Tensor, Tensor, int]:
        """Tokens (B, L, D), whether each may be looked at (B, L), and the index of the first state token."""
        batch, steps = states.shape[:2]
        valid = torch.ones(batch, steps, dtype=torch.bool, device=states.device)
        if attention_mask is not None:
            valid = attention_mask.bool()
        position = self._positions(timesteps, valid)
        goal = self._goal_tokens(goals, batch)
        state = self._state_tokens(states, image_features)
        if self.config.goal_fusion == "add" and goal is not None:
            state = state + goal
            goal = None
        tokens, is_key, first = [state + position], [valid], 0
        if self.embed_return is not None:
            tokens.insert(0, self.embed_return(returns_to_go.reshape(batch, steps, 1)) + position)
            is_key.insert(0, valid & self._kept((batch, 1), self.config.return_dropout, valid.device))
            first = 1
        if self.embed_action is not None:
            tokens.append(self.embed_action(actions) + position)
            is_key.append(valid & self._kept((batch, steps), self.config.action_dropout, valid.device))
        sequence = self.embed_norm(torch.stack(tokens, 2).flatten(1, 2))
        keys = torch.stack(is_key, 2).flatten(1, 2)
        if goal is not None:
            first += goal.shape[1]
            sequence = torch.cat([self.embed_norm(goal), sequence], 1)
            keys = torch.cat([keys.new_ones(batch, goal.shape[1]), keys], 1)
        return sequence, keys, first

    def _positions(self, timesteps: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D). In ``window`` a step's number is how many valid steps precede it: padding shifts nothing."""
        if self.config.position == "timestep":
            return self._rows_of_table(timesteps)
        if valid.shape[1] > self.config.context_steps:
            raise DataError(
                f"{valid.shape[1]} steps exceed context_steps {self.config.context_steps}; "
                "give a shorter window or position='timestep'"
            )
        return self._rows_of_table(valid.long().cumsum(1) - 1)

    def _rows_of_table(self, index: Tensor) -> Tensor:
        """(...) to (..., D); beyond the table: its first or last row."""
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
