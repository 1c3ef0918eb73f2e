"""The settings of a run: one tree, of which each component is handed only its own branch."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.models.chunking import ChunkExecution
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.replay.config import STRATA, Stratum
from vla_dist.run.config_checks import require_consistent
from vla_dist.run.roles import PlacementSettings

RECORDED = "recorded"
"""Family of robots of which only recordings are at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSettings:
    """The simulator or robot and what is asked of it."""

    family: str = "metaworld"
    """metaworld, babyai, t-maze, key-to-door, gymnasium:<id>; or recorded: robots that are no simulator, whose contract
    is that of ``rollout.archives``. Versions are trained and served then, and nobody judges them."""
    tasks: tuple[str, ...] = ()
    """All tasks, collected, trained and evaluated; of family recorded, empty: those of the archives."""
    language_tasks: tuple[str, ...] = ()
    """Those of ``tasks`` that share one scene, so that only the words tell them apart; empty: no language control."""
    max_episode_steps: int = 200
    cameras: tuple[CameraSpec, ...] = ()
    layouts: Literal["any", "split"] = "any"
    """split: no evaluation episode begins as a training episode may; a world with few layouts repeats them otherwise.
    """
    shows_goal: bool = False
    """Whether proprio holds the place of the goal; metaworld alone."""
    shows_objects: bool = True
    """Whether proprio holds the places of the objects; without them the policy has to see them; metaworld alone."""

    @property
    def has_simulator(self) -> bool:
        return self.family != RECORDED


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """The table in Redis."""

    redis_url: str = ""
    """Empty: a server of the run's own, on a Unix socket. Several, separated by commas, share the replay; the registry
    lies on the first. A Redis Cluster is named as often as there shall be shards."""
    images_redis_url: str = ""
    """Another server for the frames of cameras, one that need not log its writes; or as many as ``redis_url`` names.
    Empty: beside everything else on ``redis_url``, or, where that is empty too, a second server of the run's own."""
    archive: str = ""
    """Where every complete episode also goes, as Parquet: a path, relative to the run's folder, or a URI such as
    s3://bucket/episodes. Empty: nowhere."""
    image_encodings: tuple[str, ...] = ()
    """How frames are stored: ``raw`` (the default), ``lz4`` (clean simulator frames: a tenth of the bytes) or
    ``jpeg:QUALITY`` (real cameras), for all cameras, or for one of them as in ``table=jpeg:90``."""
    capacity_steps: int = 500_000
    segment_steps: int = 32
    """T."""
    min_steps: int = 4_000
    """Steps of complete episodes before anything is sampled."""
    samples_per_insert: float = 4.0
    """Windows sampled for each inserted step: whoever is ahead by more than the buffer waits. When the learner is
    done, inserts are free."""
    error_buffer_steps: float = 60_000.0
    strata: tuple[str, ...] = ()
    """What part of each batch comes from ``demo`` (experts and persons), ``intervention`` (policies that a person
    corrected), ``success`` and ``failure`` (policies), as in ``demo=0.5 success=0.3 failure=0.2``, or from ``demo`` and
    ``policy`` (all policies), as in ``demo=0.5 policy=0.5``; what is not there yet leaves its part to the others.
    Empty: each step is as likely as any other. One server only."""

    @property
    def stratum_shares(self) -> dict[Stratum, float]:
        """Raises ConfigError."""
        shares: dict[Stratum, float] = {}
        for word in self.strata:
            name, _, share = word.partition("=")
            if name not in STRATA:
                raise ConfigError(f"replay.strata {word!r} must be STRATUM=SHARE with one of {', '.join(STRATA)}")
            try:
                shares[name] = float(share)
            except ValueError as error:
                raise ConfigError(f"replay.strata {word!r}: {share!r} is not a number, as in {name}=0.5") from error
        return shares

    def image_encoding(self, camera: str) -> ImageEncoding:
        """Of one camera; what names it goes before what names none. Raises ConfigError."""
        by_camera = {name: text for name, _, text in (word.rpartition("=") for word in self.image_encodings)}
        return ImageEncoding.parse(by_camera.get(camera, by_camera.get("", "raw")))


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """Versions of policies."""

    blobs: str = ""
    """Where their tensors lie: a path, relative to the run's folder, or a URI such as redis://host:6379 or
    s3://bucket/policies. Empty: in the Redis of the run, which takes up to 512 MB each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """Teachers that fill the replay, and the policy itself beside them."""

    num_workers: int = 2
    teacher: Literal["expert", "random", "none"] = "expert"
    """The scripted expert, or actions drawn uniformly, which are imitated as they were executed; or nobody: what is
    learnt from comes from ``archives``, from robots and from the policy itself."""
    archives: tuple[str, ...] = ()
    """Whose episodes fill the replay as well: folders of campaigns, imported data sets or earlier runs, or URIs. Where
    they hold more than the replay takes, the newest."""
    episodes_per_task: int = 50
    """By the teacher, over all workers."""
    noise_scales: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    """Each expert episode draws one: standard deviation in action units, or the chance of a random discrete action."""
    seeds: tuple[int, ...] = ()
    """Of the teacher's episodes, one each for every task, such as what a policy failed at; where there is no teacher,
    of the policy's. Empty: drawn."""
    policy_episodes_per_task: int = 0
    """By the newest version, over all workers, in the same processes; robots of the fleet come on top."""
    policy_streams: int = 1
    """Of them that each process has under way at once, each with an environment of its own: a simulator waits for its
    action, and the service decides for all of them together."""
    policy_from_version: int = 1
    """The first version that acts in them. What an untrained one does fills the replay with failures."""
    policy_explores: bool = True
    """Whether it asks for what the learner wants to see tried, or, as robots do, for the best."""

    @property
    def total_episodes_per_task(self) -> int:
        return (0 if self.teacher == "none" else self.episodes_per_task) + self.policy_episodes_per_task


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The policy that is trained: a member of the zoo (``vla-dist models`` lists them), a size, and changes to it."""

    architecture: str = "decision_transformer"
    """Name of the member."""
    preset: str = "small"
    """A size by name; what follows replaces its own settings."""
    changes: tuple[str, ...] = ()
    """``name=value`` of any setting of the member's config, such as ``hidden_dim=64 n_layers=2``; values of lists and
    maps are JSON."""
    hidden_dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    context_steps: int | None = None
    """K. These four, as the two below: None leaves the size's own; only for members that have such a setting."""
    action_dropout: float | None = None
    """Share of past-action tokens hidden in training, so that the policy does not copy itself."""
    return_dropout: float | None = None
    """Share of windows without return tokens in training, so that an unreachable target does no harm."""
    execution: ChunkExecution = field(default_factory=ChunkExecution)
    """How the chunks of a member with a horizon are executed, by robots, rollouts and evaluation alike."""
    conditioning: ConditioningKind = "steps_to_success"
    """What the policy is told to reach: ``steps_to_success``, ``reward``, ``success``, ``advantage`` (of steps to
    success), ``reward_advantage``, or ``none``."""
    target_quantile: float = 0.9
    """How good an episode, among those in the replay, the policy is asked for while acting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Optimisation and what it leaves behind."""

    algorithm: str = ""
    """behaviour_cloning, decision_transformer, online_decision_transformer, hierarchical, memory or conditioned; empty:
    that which the model and its conditioning are made for."""
    algorithm_changes: tuple[str, ...] = ()
    """``name=value`` of the algorithm's settings, such as ``target_entropy=-1.5``."""
    intervention_share: float = 0.0
    """Part of each batch's weight that steps under a person's control have together; 0: they count as any other."""
    steps_before_takeover: int = 8
    """With ``intervention_share``: steps before a person took over that are not imitated."""
    scales_from: Literal["all", "successes"] = "all"
    """Whose proprio makes its mean and spread alike: all episodes', or that of those which succeeded, where what
    matters may span little of what all of them span. All, where none has succeeded when the learner begins."""
    total_updates: int = 2_000
    publish_updates: tuple[int, ...] = (0, 150, 400, 1_000, 2_000)
    """Updates after which a version is published; 0 is the untrained one."""
    batch_size: int = 64
    """Windows an update, over all learner workers."""
    learning_rate: float = 1e-3
    """The highest, reached at the end of the warm-up; then it falls along a cosine."""
    part_learning_rates: tuple[str, ...] = ()
    """``part=factor`` of ``learning_rate`` for a part of the model, such as ``visual=0.1 language=0``; 0: it stays as
    it is."""
    final_learning_rate_fraction: float = 0.0
    """Part of ``learning_rate`` that the cosine ends at."""
    warmup_updates: int | None = None
    """Over which it rises from 0; None: a tenth of all, 100 at most."""
    weight_decay: float = 1e-4
    """Of AdamW, on matrices only."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    checkpoint_every_updates: int = 250
    checkpoints: str = ""
    """Where they lie: a path that all nodes share, or a URI such as s3://bucket/folder. Empty: the run's folder."""
    updates_per_step: int = 25
    """Updates between two reports of progress."""
    num_workers: int = 1
    use_gpu: bool = False
    """One GPU for each learner worker."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """How several workers share one model: each holds all of it, or a part (for models that fill a GPU)."""
    num_micro_batches: int = 1
    """Parts that a worker's share of a batch is cut into, where the whole does not fit in memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    """torch.compile."""
    ema_decay: float = 0.0
    """Of the published weights; 0: publish the weights themselves."""
    sample_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """The policy service."""

    policy: str = ""
    """What is served and what rollouts ask for, as name@channel or name@version; empty: what the run itself learns."""
    host: str = ""
    """Address that it binds. Empty: loopback on one machine, all addresses on a cluster, which needs a token."""
    port: int = 9000
    num_replicas: int = 1
    startup_timeout_s: float = 120.0
    token: str = ""
    """Bearer token that every call must carry; empty: none."""
    tokens: str = ""
    """File of tokens with roles ('vla-dist token create'), on a disk that replicas see; read again when it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Simulated robots driven by the served policy over gRPC."""

    num_robots: int = 4
    control_hz: float = 20.0
    """Actions a second and robot; the simulator could go faster, a served robot does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How versions are judged, always on seeds that training cannot have."""

    episodes_per_task: int = 5
    """For each version."""
    final_episodes_per_task: int = 10
    """For the last version, and for each instruction mode of the language control."""
    num_workers: int = 1
    num_envs: int = 8
    """Environments a worker steps in lockstep, so that the policy acts on a batch."""
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. Written beside its results, read again by ``--resume``."""

    preset: str
    """Name of the preset this began as; also the name of the policy in the registry."""
    seed: int = 0
    runs_dir: str = "runs"
    """Each run gets a folder of its own in it."""
    min_memory_gib: float = 5.0
    """Refuse to start with less available."""
    object_store_mb: int = 100
    """Ray's shared memory. Neither episodes nor weights travel through it, so it may be small."""
    env: EnvSettings = field(default_factory=EnvSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)

    def __post_init__(self) -> None:
        require_consistent(self)

    @property
    def model_changes(self) -> tuple[str, ...]:
        """``name=value`` of everything that is changed in the model's preset; ``model.changes`` has the last word."""
        named = ("hidden_dim", "n_layers", "n_heads", "context_steps", "action_dropout", "return_dropout")
        given = {name: getattr(self.model, name) for name in named}
        return (*(f"{name}={value}" for name, value in given.items() if value is not None), *self.model.changes)

    @property
    def reference(self) -> str:
        """What robots ask for."""
        return self.serving.policy or f"{self.preset}@stable"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
