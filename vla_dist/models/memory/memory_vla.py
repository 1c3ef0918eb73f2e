"""MemoryAugmentedVLA: acts on what it sees and on what it wrote down earlier in the episode.

Shapes: B batch, K window steps, P proprio, G goal, A action, M slots, D width, N heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.member import masked_mean, require_batch
from vla_dist.models.memory.bank import EpisodicMemory, MemoryReader, WriteGate
from vla_dist.models.pretrained import WholePreTrainedModel, init_by_fan_in
from vla_dist.models.settings import build_config, require_heads
from vla_dist.models.step_encoder import StepEncoder
from vla_dist.models.visual_encoder import require_visual

HEADS = ("tanh", "discrete")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unrolled:
    """What K steps of B episodes came to."""

    outputs: Tensor
    """(B, K, A) actions in [-1, 1], or logits."""
    weights: Tensor
    """(B, K, N, M + 1) attention, the null slot first."""
    write_probabilities: Tensor
    """(B, K) that the step was written at all."""
    memory: EpisodicMemory
    """After the last step."""


class MemoryAugmentedVLAConfig(PreTrainedConfig):
    """Everything the constructor needs, as plain JSON.

    Attributes:
        state_dim: P, the size of ``inputs``.
        action_dim: A; choices where the head is ``discrete``.
        memory_size: M; a longer episode keeps the M things written most firmly.
        memory_dim: D.
        num_heads: of the attention that reads.
        context_steps: K of a training window. The policy itself remembers without limit.
        burn_in_steps: in a window that begins within an episode without its memory, this many steps only fill the
            memory and are not imitated.
        write_cost: weight in the loss of the expected share of steps that are written: what nobody will read shall not
            push out what matters when the bank is full. With too much of it nothing is written before reading is
            learnt.
        horizon: H, always 1.
        head: ``tanh`` (squared error, actions in [-1, 1]) or ``discrete`` (cross-entropy over A choices).
        goal_dim: G of the sentence embedding; 0: no language.
        cameras: names of the views.
        visual: settings of the VisualEncoder that the cameras share.
    """

    model_type = "vla_memory"

    state_dim: int = 39
    action_dim: int = 4
    memory_size: int = 100
    memory_dim: int = 512
    num_heads: int = 4
    context_steps: int = 16
    burn_in_steps: int = 4
    write_cost: float = 1e-4
    horizon: int = 1
    head: str = "tanh"
    goal_dim: int = 384
    cameras: list[str] | None = None
    visual: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.cameras = list(self.cameras or [])
        require_visual(self.visual)
        for name in ("action_dim", "memory_size", "memory_dim", "num_heads", "context_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"memory {name} {getattr(self, name)} must be at least 1")
        require_heads("memory_dim", self.memory_dim, self.num_heads)
        if self.write_cost < 0:
            raise ConfigError(f"write_cost {self.write_cost} must not be negative")
        if self.head not in HEADS:
            raise ConfigError(f"memory head {self.head!r} must be one of {', '.join(HEADS)}")
        if self.horizon != 1:
            raise ConfigError(f"memory horizon {self.horizon} must be 1: it decides anew at every step")
        if not 0 <= self.burn_in_steps < self.context_steps:
            raise ConfigError(
                f"burn_in_steps {self.burn_in_steps} must be within 0..{self.context_steps - 1}: a window of "
                f"{self.context_steps} steps needs one to learn from"
            )
        if self.state_dim < 0 or self.goal_dim < 0 or not (self.state_dim or self.cameras):
            raise ConfigError(
                f"state_dim {self.state_dim} and goal_dim {self.goal_dim} must not be negative, and without cameras "
                "there must be a state"
            )


class MemoryAugmentedVLA(WholePreTrainedModel):
    """Reads its memory with what it sees, acts on both, then writes down what it sees, as firmly as a gate decides.

    What is written depends on the step alone, not on what was read, so that a memory cannot drift however long the
    episode: a window of K steps teaches what an episode of any length needs. The price: it cannot count or reason over
    what it has read before.

    Source: a gated external memory as in Graves et al. 2016 (DNC) and Ritter et al. 2018 (an episodic key-value store),
    much simplified: one write a step, into a slot of its own.
    """

    config_class = MemoryAugmentedVLAConfig
    config: MemoryAugmentedVLAConfig
    base_model_prefix = "memory_vla"
    main_input_name = "inputs"
    _no_split_modules: ClassVar[list[str]] = ["MemoryReader"]

    def __init__(
        self,
        input_dim: int | MemoryAugmentedVLAConfig,
        memory_size: int = 100,
        memory_dim: int = 512,
        **settings: Any,
    ) -> None:
        """Build from dimensions, or from a config given in the first place.

        Args:
            input_dim: P.
            settings: any further field of MemoryAugmentedVLAConfig.
        """
        if isinstance(input_dim, MemoryAugmentedVLAConfig):
            config = input_dim
        else:
            sizes = {"state_dim": input_dim, "memory_size": memory_size, "memory_dim": memory_dim}
            config = build_config(MemoryAugmentedVLAConfig, settings, **sizes)
        super().__init__(config)
        width = config.memory_dim
        self.encoder = StepEncoder(
            state_dim=config.state_dim,
            goal_dim=config.goal_dim,
            output_dim=width,
            cameras=config.cameras or (),
            visual=config.visual,
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.entry = nn.Linear(width, width)
        self.write_gate = WriteGate(width)
        self.reader = MemoryReader(width, config.num_heads, max_age=max(1, config.context_steps - 1))
        self.read_gate = nn.Linear(2 * width, width)
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.action_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Without bias, also the gate: where everything is written at first, a corridor's cue was not found in time.
        init_by_fan_in(module)
        if isinstance(module, MemoryReader):
            init.normal_(module.null_key, std=0.02)
            init.normal_(module.null_value, std=0.02)

    def set_normaliser(self, **scales: Tensor | None) -> None:
        """Fill the encoder's buffers, see ``InputScales.set_normaliser``."""
        self.encoder.set_normaliser(**scales)

    def token_names(self) -> list[tuple[str, int | None]]:
        """What a step may look at; none of it belongs to one step of a window."""
        return [("nothing", None), *((f"slot {index}", None) for index in range(self.config.memory_size))]

    def initial_memory(self, num_rows: int) -> EpisodicMemory:
        """The empty memory of B episodes that begin."""
        config = self.config
        return EpisodicMemory.empty(num_rows, config.memory_size, config.memory_dim, like=self.head.weight)

    def encode_images(self, images: Mapping[str, Tensor]) -> Tensor | None:
        """camera name -> (..., 3, H, W) uint8, to the (..., D) that ``forward`` takes; None without cameras."""
        return self.encoder.encode_images(images)

    def forward(
        self,
        inputs: Tensor,
        task_embedding: Tensor | None,
        memory: EpisodicMemory | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, EpisodicMemory]:
        """One step of B episodes.

        Args:
            inputs: (B, P) float32, raw units.
            task_embedding: (B, G); None where ``goal_dim`` is 0.
            memory: of the steps before; None: nothing is remembered.
            image_features: (B, D) from ``encode_images``, where there are cameras.

        Returns:
            The action (B, A) in [-1, 1], or logits where the head is ``discrete``; the attention weights (B, N, M + 1),
            the null slot first; and the memory for the next step.
        """
        if inputs.ndim != 2:
            raise DataError(f"inputs of shape {tuple(inputs.shape)} must be (B, P); ``unroll`` takes windows")
        memory = self.initial_memory(len(inputs)) if memory is None else memory
        hidden, entries, strengths, _ = self._perceive(inputs, task_embedding, image_features)
        read, weights = self.reader(hidden, memory)
        happened = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        return self._act(hidden, read), weights, memory.written(entries, strengths, happened)

    def unroll(
        self,
        states: Tensor,
        goals: Tensor | None,
        padding_mask: Tensor,
        memory: EpisodicMemory | None = None,
        *,
        images: Mapping[str, Tensor] | None = None,
    ) -> Unrolled:
        """K steps of B episodes, equal to K calls of ``forward``; padded steps leave the memory alone.

        Args:
            states: (B, K, P).
            goals: (B, G), the same at all steps.
            padding_mask: (B, K) bool, True = valid.
            memory: at the first step, for example what the window before ended with; None: empty.
            images: camera name -> (B, K, 3, H, W).
        """
        if states.ndim != 3 or padding_mask.shape != states.shape[:2]:
            raise DataError(
                f"states of shape {tuple(states.shape)} and padding_mask {tuple(padding_mask.shape)} must be (B, K, P) "
                "and (B, K)"
            )
        batch, steps = states.shape[:2]
        task = None if goals is None else goals[:, None].expand(batch, steps, goals.shape[-1])
        hidden, entries, strengths, writes = self._perceive(states, task, self.encode_images(images or {}))
        memory = self.initial_memory(batch) if memory is None else memory
        reads, weights = [], []
        for step in range(steps):
            read, weight = self.reader(hidden[:, step], memory)
            memory = memory.written(entries[:, step], strengths[:, step], padding_mask[:, step])
            reads.append(read)
            weights.append(weight)
        return Unrolled(
            outputs=self._act(hidden, torch.stack(reads, 1)),
            weights=torch.stack(weights, 1),
            write_probabilities=writes,
            memory=memory,
        )

    def loss(self, batch: TrainBatch, memory: EpisodicMemory | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the counted steps of the error against ``target_actions`` (squared, or cross-entropy) and of the
        write cost.

        Counted are valid steps, but for the burn-in of windows that begin within an episode.

        Args:
            memory: stored state: what a policy or an earlier window ended with just before these windows, detached.
                None: a replay's windows come without it, so those that begin within an episode burn in.

        Source:
            Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed RL" (R2D2), section 3.
        """
        require_batch(batch, self.config)
        unrolled = self.unroll(batch.states, batch.goals, batch.padding_mask, memory, images=batch.images)
        return self.loss_of(unrolled, batch, batch.padding_mask if memory is not None else self.counted(batch))

    def loss_of(self, unrolled: Unrolled, batch: TrainBatch, counted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``loss`` gives, of windows that were unrolled already; ``counted`` (B, K) bool are its terms."""
        if self.config.head == "discrete":
            choice = batch.target_actions.argmax(-1)
            errors = cross_entropy(unrolled.outputs.transpose(1, 2), choice, reduction="none")
            measured = {"accuracy": (unrolled.outputs.argmax(-1) == choice).float()}
        else:
            difference = unrolled.outputs - batch.target_actions
            errors = difference.square().mean(-1)
            measured = {"action_error": difference.abs().mean(-1)}
        errors = errors + self.config.write_cost * unrolled.write_probabilities
        measured["write_rate"] = unrolled.write_probabilities
        measured["null_attention"] = unrolled.weights[..., 0].mean(-1)
        loss = masked_mean(errors, counted, batch.weights_of_steps)
        metrics = {name: masked_mean(value.detach(), counted) for name, value in measured.items()}
        return loss, {"loss": loss.detach(), **metrics}

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: how many terms ``loss`` is the mean of, so that means of parts add up to that of the whole."""
        return self.counted(batch).sum().float()

    def counted(self, batch: TrainBatch) -> Tensor:
        """(B, K) bool, steps after the burn-in.

        Where the first step is padding or the episode's own, the empty memory is the true one, and nothing burns in.
        """
        if not self.config.burn_in_steps:
            return batch.padding_mask
        begins_within = batch.padding_mask[:, 0] & (batch.timesteps[:, 0] > 0)
        step = torch.arange(batch.padding_mask.shape[1], device=batch.padding_mask.device)
        burns_in = begins_within[:, None] & (step < self.config.burn_in_steps)
        return batch.padding_mask & ~burns_in

    def _perceive(
        self, states: Tensor, goals: Tensor | None, image_features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(..., P) to hidden (..., D), what to write (..., D), how firmly (...) and how probably at all (...)."""
        hidden = self.encoder_norm(self.encoder(states, goals, image_features))
        hidden = hidden + self.narrow(gelu(self.widen(hidden)))
        return hidden, self.entry(hidden), *self.write_gate(hidden)

    def _act(self, hidden: Tensor, read: Tensor) -> Tensor:
        gate = torch.sigmoid(self.read_gate(torch.cat([hidden, read], -1)))
        output = self.head(self.head_norm(hidden + gate * read))
        return output.tanh() if self.config.head == "tanh" else output


AutoConfig.register(MemoryAugmentedVLAConfig.model_type, MemoryAugmentedVLAConfig, exist_ok=True)
AutoModel.register(MemoryAugmentedVLAConfig, MemoryAugmentedVLA, exist_ok=True)
