"""Vision and language into one vector, in four ways.

Shapes: B batch, N visual tokens, L language tokens, V visual width, W language width, D hidden width, H heads.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.language_encoder import mean_over_tokens
from vla_dist.models.pretrained import WholePreTrainedModel, init_by_fan_in
from vla_dist.models.settings import build_config, require_heads

FusionType = Literal["concat", "cross_attention", "gated_fusion", "film"]
FUSIONS: tuple[FusionType, ...] = get_args(FusionType)


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another and to a learned token that stands for nothing.

    The token keeps the weights meaningful when the other sequence has one element: a softmax over that alone is 1
    whatever it says. It also gives a row without any valid key something to look at.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads("the width", dim, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.nothing = nn.Parameter(0.02 * torch.randn(1, 1, dim))

    def forward(self, tokens: Tensor, others: Tensor, valid: Tensor) -> Tensor:
        """(B, N, D) that look at (B, L, D) where (B, L) is True, to (B, N, D)."""
        query, key, value, visible = self._split(tokens, others, valid)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(self, tokens: Tensor, others: Tensor, valid: Tensor) -> Tensor:
        """(B, H, N, 1 + L): how much each token looks at nothing, and at each of the others; rows sum to one."""
        query, key, _, visible = self._split(tokens, others, valid)
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        return scores.masked_fill(~visible, float("-inf")).softmax(-1)

    def _split(self, tokens: Tensor, others: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = len(tokens)
        others = torch.cat([self.nothing.expand(batch, 1, -1), others], 1)
        visible = torch.cat([valid.new_ones(batch, 1), valid], 1)[:, None, None]

        def per_head(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(others).chunk(2, -1)
        return per_head(self.query(tokens)), per_head(key), per_head(value), visible


class MultimodalFusionConfig(PreTrainedConfig):
    """Settings of a MultimodalFusion, as plain JSON.

    Attributes:
        input_dim: V, and W unless ``language_dim`` says otherwise.
        hidden_dim: D.
        fusion_type: ``concat``, ``cross_attention``, ``gated_fusion`` or ``film``.
        language_dim: W; None: V.
        num_heads: H, for ``cross_attention``.
    """

    model_type = "vla_multimodal_fusion"

    input_dim: int = 512
    hidden_dim: int = 512
    fusion_type: str = "concat"
    language_dim: int | None = None
    num_heads: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.fusion_type not in FUSIONS:
            raise ConfigError(f"fusion_type {self.fusion_type!r} must be one of {', '.join(FUSIONS)}")
        widths = (self.input_dim, self.hidden_dim, self.input_dim if self.language_dim is None else self.language_dim)
        if min(*widths, self.num_heads) < 1:
            raise ConfigError(
                f"fusion of widths {self.input_dim}, {self.language_dim} to {self.hidden_dim} with {self.num_heads} "
                "heads needs positive widths and heads"
            )
        if self.fusion_type == "cross_attention":
            require_heads("the width", self.hidden_dim, self.num_heads)


class MultimodalFusion(WholePreTrainedModel):
    """(visual, language) to (B, D); every type learns from both, in every parameter.

    * ``concat``: an MLP of both pooled vectors.
    * ``gated_fusion``: g = sigmoid(W [v; l]), then an MLP of g v + (1 - g) l. Source: Arevalo et al. 2017, "Gated
      Multimodal Units", section 3.1.
    * ``cross_attention``: visual tokens look at language tokens; pre-norm, both residuals, then a mean over tokens.
    * ``film``: language scales and shifts each visual token before an MLP and the mean. Source: Perez et al. 2018.
    """

    config_class = MultimodalFusionConfig
    config: MultimodalFusionConfig
    base_model_prefix = "fusion"
    main_input_name = "visual"
    _supports_sdpa = True

    def __init__(
        self,
        input_dim: int | MultimodalFusionConfig,
        hidden_dim: int = 512,
        fusion_type: str = "concat",
        **settings: Any,
    ) -> None:
        """Build from widths, or from a config given in the first place.

        Args:
            settings: any further field of MultimodalFusionConfig.

        Raises:
            ConfigError: an unknown type, or heads that do not divide the width.
        """
        if isinstance(input_dim, MultimodalFusionConfig):
            config = input_dim
        else:
            config = build_config(
                MultimodalFusionConfig, settings, input_dim=input_dim, hidden_dim=hidden_dim, fusion_type=fusion_type
            )
        super().__init__(config)
        input_dim, hidden_dim = config.input_dim, config.hidden_dim
        self.language_dim = input_dim if config.language_dim is None else config.language_dim
        self.visual_dim = input_dim
        self.project_visual = nn.Linear(input_dim, hidden_dim)
        self.project_language = nn.Linear(self.language_dim, hidden_dim)
        self.visual_norm = nn.LayerNorm(hidden_dim)
        self.language_norm = nn.LayerNorm(hidden_dim)
        self.gate = self.attention = self.modulation = None
        if config.fusion_type == "gated_fusion":
            self.gate = nn.Linear(2 * hidden_dim, hidden_dim)
        elif config.fusion_type == "cross_attention":
            self.attention = CrossAttention(hidden_dim, config.num_heads)
            self.attended_norm = nn.LayerNorm(hidden_dim)
        elif config.fusion_type == "film":
            self.modulation = nn.Linear(hidden_dim, 2 * hidden_dim)
        width = 2 * hidden_dim if config.fusion_type == "concat" else hidden_dim
        self.combine = nn.Sequential(nn.Linear(width, 2 * hidden_dim), nn.GELU(), nn.Linear(2 * hidden_dim, hidden_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_by_fan_in(module)
        if isinstance(module, CrossAttention):
            init.normal_(module.nothing, std=0.02)

    def forward(
        self,
        visual: Tensor,
        language: Tensor,
        *,
        visual_mask: Tensor | None = None,
        language_mask: Tensor | None = None,
    ) -> Tensor:
        """Fuse to (B, D).

        Args:
            visual: (B, V) or (B, N, V).
            language: (B, W) or (B, L, W).
            visual_mask: (B, N), 1 or True = real; None: all.
            language_mask: (B, L), 1 or True = real; None: all.

        Raises:
            DataError: shapes that do not fit the widths or each other.
        """
        visual, language, seen, said = self._tokens(visual, language, visual_mask, language_mask)
        if self.attention is not None:
            visual = visual + self.attention(self.visual_norm(visual), self.language_norm(language), said)
            return mean_over_tokens(visual + self.combine(self.attended_norm(visual)), seen)
        visual, words = self.visual_norm(visual), mean_over_tokens(self.language_norm(language), said)
        if self.modulation is not None:
            scale, shift = self.modulation(words)[:, None].chunk(2, -1)
            return mean_over_tokens(self.combine((1.0 + scale) * visual + shift), seen)
        picture = mean_over_tokens(visual, seen)
        both = torch.cat([picture, words], -1)
        if self.gate is not None:
            gate = self.gate(both).sigmoid()
            return self.combine(gate * picture + (1.0 - gate) * words)
        return self.combine(both)

    def attention_weights(
        self,
        visual: Tensor,
        language: Tensor,
        *,
        visual_mask: Tensor | None = None,
        language_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, N, 1 + L) of the same inputs: how much each visual token looks at nothing, and at each word.

        Raises:
            ConfigError: another type than ``cross_attention``.
        """
        if self.attention is None:
            kind = self.config.fusion_type
            raise ConfigError(f"{kind!r} has no attention weights; use fusion_type='cross_attention'")
        visual, language, _, said = self._tokens(visual, language, visual_mask, language_mask)
        return self.attention.weights(self.visual_norm(visual), self.language_norm(language), said)

    def _tokens(
        self, visual: Tensor, language: Tensor, visual_mask: Tensor | None, language_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = []
        for name, tokens, mask, width in (
            ("visual", visual, visual_mask, self.visual_dim),
            ("language", language, language_mask, self.language_dim),
        ):
            tokens = tokens[:, None] if tokens.ndim == 2 else tokens
            valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            if mask is not None:
                valid = mask.bool()
            if tokens.ndim != 3 or tokens.shape[-1] != width or valid.shape != tokens.shape[:2]:
                raise DataError(
                    f"{name} features of shape {tuple(tokens.shape)} with mask {tuple(valid.shape)} must be "
                    f"(B, {width}) or (B, tokens, {width}) with mask (B, tokens)"
                )
            found.append((tokens, valid))
        (visual, seen), (language, said) = found
        if len(visual) != len(language):
            raise DataError(f"{len(visual)} rows of vision cannot be fused with {len(language)} rows of language")
        return self.project_visual(visual), self.project_language(language), seen, said


AutoConfig.register(MultimodalFusionConfig.model_type, MultimodalFusionConfig, exist_ok=True)
AutoModel.register(MultimodalFusionConfig, MultimodalFusion, exist_ok=True)
