"""Settings of HierarchicalVLA."""

from typing import Any

from transformers import PreTrainedConfig

from vla_dist.core.errors import ConfigError
from vla_dist.models.clauses import require_clauses
from vla_dist.models.visual_encoder import require_visual

HEADS = ("tanh", "discrete")
PLANNERS = ("reactive", "sketch")
SUBGOAL_FUSIONS = ("concat", "film")
ALIGNMENTS = ("window", "episode")


class HierarchicalVLAConfig(PreTrainedConfig):
    """Everything the constructor needs, as plain JSON.

    Attributes:
        high_level_dim: width of what the planner reads: proprio, goal and views, encoded.
        low_level_dim: width of what the controller reads: proprio and views, encoded by encoders of its own.
        state_dim: P.
        action_dim: A; choices where the head is ``discrete``.
        subgoal_dim: Z, width of a subgoal where the controller reads it.
        hidden_dim: of both levels' hidden layer; 0: the controller is one linear layer.
        skills: S names, as tasks or instructions call them; empty: a subgoal is a state to be reached.
        hold_steps: k, a reactive planner is asked every k steps.
        learned_termination: it is also asked where the controller finds the skill done; needs skills.
        alignment: where several skills run in a row, which ran when is found in each ``window`` by itself, or as a part
            of its ``episode``, which begins with the first skill and, where it succeeded, ends with the last.
        controller: None: built in. Else ``{"architecture": name, ...}``: another member of the zoo with its own
            settings, whose goal is the skill; needs skills and ``goal_dim`` or words in that member.
        subgoal_fusion: how the built-in controller and its termination read a subgoal: ``concat``, beside what they
            see, or ``film``, which scales and shifts it besides, to find a thing by its name among several.
        controller_context_steps: how many of the last steps the built-in controller sees; 1: the moment alone.
        planner: ``reactive``, which looks and names a skill each time it is asked, or ``sketch``, which reads the order
            of skills from the clauses of the words and goes on to the next where the termination says that one is done.
        planner_context_steps: the same of the planner. It then looks at every step, not only at those where it is
            asked. Of a reactive planner.
        previous_skill_noise: in training, share of the steps at which the planner is told any skill of the episode's
            as the one before: told the truth alone it copies it, whatever it sees.
        context_steps: K of a training window, at least either.
        horizon: H; 1 unless the controller is a member that chunks.
        head: ``tanh`` (squared error, actions in [-1, 1]) or ``discrete``; with another member, its own head's name.
        goal_dim: G of the sentence embedding that the planner reads; 0: no language.
        goal_clauses: M clauses that are embedded one by one, side by side in G; 1: the sentence as a whole.
        cameras: names of the views.
        visual: settings of the VisualEncoder of each level.
    """

    model_type = "vla_hierarchical"

    high_level_dim: int = 64
    low_level_dim: int = 64
    state_dim: int = 39
    action_dim: int = 4
    subgoal_dim: int = 32
    hidden_dim: int = 64
    skills: list[str] | None = None
    hold_steps: int = 5
    learned_termination: bool = False
    alignment: str = "window"
    controller: dict[str, Any] | None = None
    subgoal_fusion: str = "concat"
    controller_context_steps: int = 1
    planner: str = "reactive"
    planner_context_steps: int = 1
    previous_skill_noise: float = 0.5
    context_steps: int = 10
    horizon: int = 1
    head: str = "tanh"
    goal_dim: int = 384
    goal_clauses: int = 1
    cameras: list[str] | None = None
    visual: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.cameras, self.skills = list(self.cameras or []), list(self.skills or [])
        require_visual(self.visual)
        for name in ("high_level_dim", "low_level_dim", "action_dim", "subgoal_dim", "hold_steps", "context_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hierarchical {name} {getattr(self, name)} must be at least 1")
        for name in ("controller_context_steps", "planner_context_steps"):
            if not 1 <= getattr(self, name) <= self.context_steps:
                raise ConfigError(
                    f"hierarchical {name} {getattr(self, name)} must be within 1 and context_steps "
                    f"{self.context_steps}: a window must hold what a level sees"
                )
        if not 0.0 <= self.previous_skill_noise <= 1.0:
            raise ConfigError(f"hierarchical previous_skill_noise {self.previous_skill_noise} must be within 0 and 1")
        if min(self.hidden_dim, self.goal_dim, self.state_dim) < 0 or not (self.state_dim or self.cameras):
            raise ConfigError(
                "hierarchical hidden_dim, goal_dim and state_dim must not be negative, nor all inputs absent"
            )
        if len(set(self.skills)) != len(self.skills):
            raise ConfigError(f"hierarchical skills {self.skills} must be distinct")
        require_clauses(self.goal_dim, self.goal_clauses)
        if not self.skills:
            self._require_latent()
        for name, allowed in (("subgoal_fusion", SUBGOAL_FUSIONS), ("alignment", ALIGNMENTS), ("planner", PLANNERS)):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"hierarchical {name} {value!r} must be one of {', '.join(allowed)}")
        if self.planner == "sketch":
            self._require_sketch()
        if self.controller is not None and (self.controller_context_steps != 1 or self.subgoal_fusion != "concat"):
            raise ConfigError(
                "controller_context_steps and subgoal_fusion are of the built-in controller; another one has its own "
                "context and fusion"
            )
        if self.controller is None and (self.horizon != 1 or self.head not in HEADS):
            raise ConfigError(
                f"the built-in controller has horizon 1 and a head of {', '.join(HEADS)}, got {self.horizon} and "
                f"{self.head!r}; name another controller for more"
            )

    def _require_sketch(self) -> None:
        if not (self.skills and self.learned_termination and self.goal_dim) or self.controller is not None:
            raise ConfigError(
                "a planner that follows a sketch reads words (goal_dim) that name skills, and goes on where "
                "learned_termination says so, which needs the built-in controller"
            )
        if self.planner_context_steps != 1:
            raise ConfigError("a planner that follows a sketch looks at words alone; planner_context_steps must be 1")

    def _require_latent(self) -> None:
        if self.learned_termination or self.controller is not None:
            raise ConfigError("learned_termination and another controller need named skills; give the config skills")
        if not self.state_dim:
            raise ConfigError("without skills a subgoal is a state, so state_dim must not be 0; name skills instead")
        if self.context_steps <= self.hold_steps:
            raise ConfigError(
                f"context_steps {self.context_steps} must exceed hold_steps {self.hold_steps}: the window must hold "
                "the state that a subgoal was to reach"
            )
