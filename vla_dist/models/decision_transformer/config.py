"""Settings of a Decision Transformer."""

from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from vla_dist.core.errors import ConfigError
from vla_dist.models.clauses import require_clauses
from vla_dist.models.settings import require_heads
from vla_dist.models.transformer import ACTIVATIONS
from vla_dist.models.visual_encoder import require_visual

Head = Literal["tanh", "gaussian", "bins", "discrete"]
Position = Literal["window", "timestep"]
GoalFusion = Literal["prefix", "add", "film"]
Window = Literal["slide", "hop"]


class VlaDecisionTransformerConfig(PreTrainedConfig):
    """Everything the constructor needs, as plain JSON.

    Attributes:
        state_dim: P.
        action_dim: A; choices where the head is ``discrete``.
        hidden_dim: D.
        max_episode_len: size of the timestep table; later steps share its last row.
        context_steps: K, steps a policy remembers; size of the ``window`` position table.
        inner_dim: width of the MLP; None: 4 D.
        window: what is forgotten when a policy has seen more than K steps. ``slide``: always the oldest one, as in the
            paper; every act then computes the whole window anew. ``hop``: half of the window every K / 2 steps, so that
            the steps in between add to a cache; a policy remembers between K / 2 + 1 and K steps.
        head: ``tanh`` (squared error, actions in [-1, 1]), ``gaussian`` (likelihood and entropy of a Gaussian squashed
            by tanh), ``bins`` (cross-entropy over bins of a dimension) or ``discrete`` (cross-entropy over A choices).
        num_bins: of each dimension, for ``bins``.
        position: ``window`` numbers the valid steps of the window, so a policy rebuilt from its last K observations is
            the same policy; ``timestep`` numbers the steps of the episode, as in the paper.
        goal_dim: G of the sentence embedding; 0: no language.
        goal_clauses: M clauses that are embedded one by one, side by side in G; 1: the sentence as a whole.
        goal_fusion: ``prefix`` puts goal tokens before the first step; ``add`` adds the goal to each state token;
            ``film`` scales and shifts each state token by it, which finds a thing by its name among several.
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
    num_bins: int = 256
    window: str = "slide"
    position: str = "window"
    goal_dim: int = 384
    goal_clauses: int = 1
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
        require_visual(self.visual)
        for name, value, allowed in (
            ("head", self.head, get_args(Head)),
            ("window", self.window, get_args(Window)),
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
        require_heads("hidden_dim", self.hidden_dim, self.n_heads)
        for name in ("dropout", "action_dropout", "return_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"decision transformer {name} {getattr(self, name)} must be within [0, 1)")
        if self.num_bins < 2:
            raise ConfigError(f"num_bins {self.num_bins} must be at least 2")
        if self.goal_dim < 0:
            raise ConfigError(f"goal_dim {self.goal_dim} must be 0 (no language) or the size of an embedding")
        require_clauses(self.goal_dim, self.goal_clauses)

    @property
    def horizon(self) -> int:
        """One action at a time."""
        return 1

    @property
    def num_outputs(self) -> int:
        """O, numbers that the head gives a step."""
        return self.action_dim * {"gaussian": 2, "bins": self.num_bins}.get(self.head, 1)
