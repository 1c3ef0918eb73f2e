"""The two levels, a planner and a controller; each reads one moment or the last few.

Shapes: ... any leading dimensions, B windows, K steps, F steps that a level sees at once, P proprio, G goal, A action,
D width of the level (high_level_dim, low_level_dim), S skills.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from vla_dist.core.errors import DataError
from vla_dist.models.film import FiLM
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.step_encoder import StepEncoder


class Level(nn.Module):
    """Perception of one level, not shared with the other."""

    def __init__(self, config: HierarchicalVLAConfig, width: int, goal_dim: int, *, steps: int) -> None:
        """Args:
        steps: F.
        """
        super().__init__()
        self.encoder = StepEncoder(
            state_dim=config.state_dim,
            goal_dim=goal_dim,
            output_dim=width,
            cameras=config.cameras or (),
            visual=config.visual,
        )
        self.norm = nn.LayerNorm(width)
        self.recollection = Recollection(width, steps) if steps > 1 else None

    @property
    def context_steps(self) -> int:
        """F."""
        return 1 if self.recollection is None else self.recollection.steps

    def recall(self, recent: Tensor, is_step: Tensor) -> Tensor:
        """(..., F, D) from ``perceive``, newest last, and (..., F) bool where there was a step, to the (..., D) that
        is decided on.
        """
        return recent[..., -1, :] if self.recollection is None else self.recollection(recent, is_step)

    def recall_window(self, perceived: Tensor, is_step: Tensor) -> Tensor:
        """(B, K, D) from ``perceive`` and (B, K) bool to (B, K, D): each step as it is seen when it is the newest."""
        return perceived if self.recollection is None else self.recollection.over_window(perceived, is_step)

    def _perceive(self, states: Tensor, goals: Tensor | None, images: Mapping[str, Tensor]) -> Tensor:
        return gelu(self.norm(self.encoder(states, goals, self.encoder.encode_images(images))))


class Planner(Level):
    """High-level state and the skill before it to S logits, or to the P normalised displacement of the next hold."""

    def __init__(self, config: HierarchicalVLAConfig) -> None:
        super().__init__(config, config.high_level_dim, config.goal_dim, steps=config.planner_context_steps)
        num_skills = len(config.skills or ())
        self.before = nn.Embedding(num_skills + 1, config.high_level_dim) if num_skills else None
        self.widen = nn.Linear(config.high_level_dim, config.hidden_dim or config.high_level_dim)
        self.head = nn.Linear(config.hidden_dim or config.high_level_dim, num_skills or config.state_dim)

    def perceive(self, states: Tensor, goals: Tensor | None, images: Mapping[str, Tensor]) -> Tensor:
        """(..., P), (..., G) and camera name -> (..., 3, H, W) to (..., D), each step by itself."""
        return self._perceive(states, goals, images)

    def forward(self, high: Tensor, before: Tensor | None) -> Tensor:
        """Args:
        high: (..., D) from ``perceive`` or, of a planner with a context, from ``recall``.
        before: (...) int64, S or None where no skill ran.
        """
        if high.shape[-1] != self.widen.in_features:
            raise DataError(f"high_level_state of shape {tuple(high.shape)} must end in {self.widen.in_features}")
        if self.before is not None:
            if before is None:
                before = torch.full(high.shape[:-1], self.before.num_embeddings - 1, device=high.device)
            high = high + self.before(before)
        return self.head(gelu(self.widen(high)))


class Told(nn.Module):
    """What the controller sees beside its subgoal and, with ``film``, scaled and shifted by it.

    Beside each other, a hidden layer adds what is seen to what is wanted; to find a thing by its name among several is
    a product of the two.
    """

    def __init__(self, config: HierarchicalVLAConfig) -> None:
        super().__init__()
        self.output_dim = config.low_level_dim + config.subgoal_dim
        self.film = FiLM(config.subgoal_dim, config.low_level_dim) if config.subgoal_fusion == "film" else None

    def forward(self, low: Tensor, subgoal: Tensor) -> Tensor:
        """(..., D) and (..., Z) to (..., D + Z)."""
        if self.film is not None:
            low = self.film(low.flatten(0, -2), subgoal.flatten(0, -2)).view_as(low)
        return torch.cat([low, subgoal], -1)


class Controller(Level):
    """Linear(low_level_dim + subgoal_dim), through a hidden layer where there is one."""

    def __init__(self, config: HierarchicalVLAConfig) -> None:
        super().__init__(config, config.low_level_dim, 0, steps=config.controller_context_steps)
        self.squash = config.head == "tanh"
        self.low_level_dim = config.low_level_dim
        self.told = Told(config)
        joined = self.told.output_dim
        self.widen = nn.Linear(joined, config.hidden_dim) if config.hidden_dim else None
        self.head = nn.Linear(config.hidden_dim or joined, config.action_dim)

    def perceive(self, states: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """(..., P) and camera name -> (..., 3, H, W) to (..., D), each step by itself."""
        return self._perceive(states, None, images)

    def forward(self, low: Tensor, subgoal: Tensor) -> Tensor:
        if low.shape[-1] != self.low_level_dim:
            raise DataError(f"low_level_state of shape {tuple(low.shape)} must end in {self.low_level_dim}")
        joined = self.told(low, subgoal)
        output = self.head(joined if self.widen is None else gelu(self.widen(joined)))
        return output.tanh() if self.squash else output


class Termination(nn.Module):
    """What the controller acts on and its subgoal to the logit that the subgoal had been reached before this step.

    With a hidden layer: when a drawer is open, an opening is over and a closing has not begun. A linear one could only
    add what the state says to what the subgoal says.
    """

    def __init__(self, config: HierarchicalVLAConfig) -> None:
        super().__init__()
        self.told = Told(config)
        self.widen = nn.Linear(self.told.output_dim, config.hidden_dim or config.low_level_dim)
        self.head = nn.Linear(self.widen.out_features, 1)

    def forward(self, low: Tensor, subgoal: Tensor) -> Tensor:
        """(..., D) and (..., Z) to (...)."""
        return self.head(gelu(self.widen(self.told(low, subgoal)))).squeeze(-1)


class Recollection(nn.Module):
    """What the newest step makes of the last F: it asks them by attention of one head, each told by its age."""

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.age = nn.Embedding(steps, dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, recent: Tensor, is_step: Tensor) -> Tensor:
        """(..., F, D), newest last, and (..., F) bool to (..., D)."""
        if recent.shape[-2] != self.steps:
            raise DataError(f"{recent.shape[-2]} steps were given to a level that sees {self.steps}")
        newest = recent[..., -1:, :]
        key, value = self.key_value(recent + self.age.weight.flip(0)).chunk(2, -1)
        seen = scaled_dot_product_attention(self.query(newest), key, value, attn_mask=is_step[..., None, :])
        return self.norm(newest + self.out(seen)).squeeze(-2)

    def over_window(self, perceived: Tensor, is_step: Tensor) -> Tensor:
        """(B, K, D) and (B, K) bool to the (B, K, D) that ``forward`` gives where each step is the newest.

        What is linear in an age is added to the scores and to the outcome, so each step is projected once and not F
        times. Source: Shaw et al. 2018, "Self-Attention with Relative Position Representations", section 3.3.
        """
        step = torch.arange(perceived.shape[1], device=perceived.device)
        age = step[:, None] - step
        # A padded step sees itself, as a softmax over nothing would be NaN; nobody learns from it.
        is_seen = ((age >= 0) & (age < self.steps) & is_step[:, None]) | (age == 0)
        age_of = age.clamp(0, self.steps - 1).expand(len(perceived), -1, -1)
        query = self.query(perceived) * perceived.shape[-1] ** -0.5
        key, value = self.key_value(perceived).chunk(2, -1)
        key_of_age, value_of_age = linear(self.age.weight, self.key_value.weight).chunk(2, -1)
        scores = query @ key.transpose(1, 2) + (query @ key_of_age.T).gather(2, age_of)
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        by_age = weights.new_zeros(*weights.shape[:2], self.steps).scatter_add(2, age_of, weights)
        return self.norm(perceived + self.out(weights @ value + by_age @ value_of_age))
