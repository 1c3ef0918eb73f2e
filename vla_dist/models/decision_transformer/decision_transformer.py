"""Decision Transformer: the next action from returns-to-go, states, past actions and an instruction.

Source: Chen et al. 2021, "Decision Transformer", section 3 and algorithm 1; the blocks are GPT-2's.

Shapes: B batch, T steps, P proprio, A action, G goal, D width, S tokens a step (return, state, action), O outputs of
the head a step, L tokens of a sequence.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.camera_views import CameraViews
from vla_dist.models.decision_transformer.config import VlaDecisionTransformerConfig
from vla_dist.models.film import FiLM
from vla_dist.models.heads import from_bins, to_bins
from vla_dist.models.member import masked_mean, require_batch
from vla_dist.models.pretrained import WholePreTrainedModel
from vla_dist.models.scales import InputScales
from vla_dist.models.settings import build_config
from vla_dist.models.squashed_gaussian import SquashedGaussian
from vla_dist.models.transformer import ResidualLinear, Transformer, causal_visibility, residual_gain


class DecisionTransformer(InputScales, CameraViews, WholePreTrainedModel):
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
            config = build_config(
                VlaDecisionTransformerConfig,
                settings,
                state_dim=state_dim,
                action_dim=action_dim,
                hidden_dim=hidden_dim,
                n_layers=n_layers,
                n_heads=n_heads,
                max_episode_len=max_episode_len,
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
        self.embed_goal: nn.Linear | None = None
        if config.goal_dim and config.goal_fusion == "film":
            self.embed_goal = FiLM(config.goal_dim, width)
        elif config.goal_dim:
            self.embed_goal = nn.Linear(config.goal_dim, prefix * width)
        self.register_views(config.cameras or (), config.visual, width)
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
        self.register_scales(config.state_dim, config.goal_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Unit-variance embeddings, shrunk residual branches, and a head that starts near zero."""
        # Only modules with parameters of their own come here.
        if isinstance(module, FiLM):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            gain = residual_gain(self.config.n_layers) if isinstance(module, ResidualLinear) else 1.0
            init.normal_(module.weight, std=0.02 if module is self.head else gain * module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

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
        steps = (states, actions, returns_to_go, goals, timesteps, attention_mask)
        sequence, is_key, first = self.sequence(*steps, image_features=image_features)
        wanted = slice(first, None, self.tokens_per_step)
        return self.head(self.transformer(sequence, causal_visibility(is_key), read=wanted))

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

    def sequence(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        goals: Tensor | None,
        timesteps: Tensor,
        attention_mask: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """The arguments of ``forward`` as tokens.

        The action of the newest step is left out: nothing that is read can see it.

        Returns:
            Tokens (B, L, D), whether each may be looked at (B, L), and the index of the first state token.
        """
        batch, steps = states.shape[:2]
        valid = torch.ones(batch, steps, dtype=torch.bool, device=states.device)
        if attention_mask is not None:
            valid = attention_mask.bool()
        position = self._positions(timesteps, valid)
        goal = self.goal_tokens(goals, batch)
        state = self.told(self.state_tokens(states, image_features) + position, goals)
        tokens, is_key, first = [state], [valid], 0
        if self.embed_return is not None:
            tokens.insert(0, self.embed_return(returns_to_go.reshape(batch, steps, 1)) + position)
            is_key.insert(0, valid & self._kept((batch, 1), self.config.return_dropout, valid.device))
            first = 1
        if self.embed_action is not None:
            tokens.append(self.embed_action(actions) + position)
            is_key.append(valid & self._kept((batch, steps), self.config.action_dropout, valid.device))
        length = steps * self.tokens_per_step - (self.embed_action is not None)
        sequence = self.embed_norm(torch.stack(tokens, 2).flatten(1, 2)[:, :length])
        keys = torch.stack(is_key, 2).flatten(1, 2)[:, :length]
        if goal is not None:
            first += goal.shape[1]
            sequence = torch.cat([self.embed_norm(goal), sequence], 1)
            keys = torch.cat([keys.new_ones(batch, goal.shape[1]), keys], 1)
        return sequence, keys, first

    def token_names(self) -> list[tuple[str, int | None]]:
        """Kind and step of each token of a whole window, the newest step 0, the one before -1; None: the goal's."""
        config = self.config
        prefix = config.num_goal_tokens if config.goal_dim and config.goal_fusion == "prefix" else 0
        kinds = ["R"] * config.use_returns + ["s"] + ["a"] * config.use_previous_actions
        steps = range(1 - config.context_steps, 1)
        names: list[tuple[str, int | None]] = [("goal", None)] * prefix
        names += [(kind, step) for step in steps for kind in kinds if (kind, step) != ("a", 0)]
        return names

    def _positions(self, timesteps: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D). In ``window`` a step's number is how many valid steps precede it: padding shifts nothing."""
        if self.config.position == "timestep":
            return self.rows_of_table(timesteps)
        if valid.shape[1] > self.config.context_steps:
            raise DataError(
                f"{valid.shape[1]} steps exceed context_steps {self.config.context_steps}; "
                "give a shorter window or position='timestep'"
            )
        return self.rows_of_table(valid.long().cumsum(1) - 1)

    def rows_of_table(self, index: Tensor) -> Tensor:
        """(...) int64 numbers of steps to (..., D); beyond the table: its first or last row."""
        return self.embed_position(index.clamp(0, self.embed_position.num_embeddings - 1))

    def state_tokens(self, states: Tensor, image_features: Tensor | None) -> Tensor:
        """(..., P) raw and (..., D) from ``encode_images`` to (..., D).

        Raises:
            DataError: another P, or image features where there are no cameras, or none where there are.
        """
        if states.shape[-1] != self.config.state_dim:
            raise DataError(f"states of shape {tuple(states.shape)} must end in {self.config.state_dim}, the state_dim")
        if (image_features is None) != (self.visual is None):
            has = "has" if image_features is None else "has no"
            raise DataError(f"this decision transformer {has} cameras {self.config.cameras}; match its images to them")
        token = self.embed_state(self.normalised(states))
        return token if image_features is None else token + image_features

    def told(self, states: Tensor, goals: Tensor | None) -> Tensor:
        """(B, T, D) state tokens with their positions and (B, G) to (B, T, D), where the goal goes into each of them;
        unchanged where it precedes them. Raises DataError.
        """
        if self.config.goal_fusion == "prefix" or (words := self._words(goals, len(states))) is None:
            return states
        if isinstance(self.embed_goal, FiLM):
            return self.embed_goal(states.transpose(1, 2), words).transpose(1, 2)
        assert self.embed_goal is not None
        return states + self.embed_goal(words)[:, None]

    def goal_tokens(self, goals: Tensor | None, batch: int) -> Tensor | None:
        """(B, G) sentence embeddings to the (B, tokens, D) before the first step; None where there are none. Raises
        DataError.
        """
        words = self._words(goals, batch)
        if words is None or self.embed_goal is None or self.config.goal_fusion != "prefix":
            return None
        return self.embed_goal(words).view(batch, -1, self.config.hidden_dim)

    def _words(self, goals: Tensor | None, batch: int) -> Tensor | None:
        """(B, G) normalised; None where the model takes none. Raises DataError."""
        size = self.config.goal_dim
        if (goals is None) != (self.embed_goal is None):
            raise DataError(f"goal_dim is {size} but goals are {'absent' if goals is None else 'given'}")
        if goals is None or self.embed_goal is None:
            return None
        if goals.shape != (batch, size):
            raise DataError(f"goals of shape {tuple(goals.shape)} must be ({batch}, {size})")
        return self.normalised_goals(goals)

    def _kept(self, shape: tuple[int, int], dropout: float, device: torch.device) -> Tensor:
        if not (self.training and dropout):
            return torch.ones(shape, dtype=torch.bool, device=device)
        return torch.rand(shape, device=device) >= dropout


AutoConfig.register(VlaDecisionTransformerConfig.model_type, VlaDecisionTransformerConfig, exist_ok=True)
AutoModel.register(VlaDecisionTransformerConfig, DecisionTransformer, exist_ok=True)
