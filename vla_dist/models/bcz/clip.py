"""CLIP's two towers, apart: pictures to embeddings, texts to embeddings.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".

Shapes: B batch, T steps, P the common width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.models.pixels import unit_pixels
from vla_dist.models.settings import config_errors, require_heads

_PIXEL_MEAN, _PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipVision(nn.Module):
    """Frames of any size, scaled to CLIP's."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        with config_errors("CLIP's vision tower"):
            config = CLIPVisionConfig(**settings)
            require_heads("hidden_size of CLIP's vision tower", config.hidden_size, config.num_attention_heads)
            self.tower = CLIPVisionModelWithProjection(config)
        self.register_buffer("pixel_mean", torch.tensor(_PIXEL_MEAN).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(_PIXEL_STD).view(1, 3, 1, 1))

    @property
    def output_dim(self) -> int:
        """P."""
        return self.tower.config.projection_dim

    def forward(self, images: Tensor) -> Tensor:
        """(B, T, 3, H, W) uint8 or float in [0, 1], to (B, T, P)."""
        flat = unit_pixels(images.flatten(0, 1), self.pixel_mean.dtype)
        size = (int(cast(int, self.tower.config.image_size)),) * 2
        if tuple(flat.shape[-2:]) != size:
            flat = interpolate(flat, size, mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
        pixels = (flat - self.pixel_mean) / self.pixel_std
        return self.tower(pixel_values=pixels).image_embeds.unflatten(0, images.shape[:2])


class ClipText(nn.Module):
    """Texts to one token each.

    Without published weights it reads single bytes under the published ids: CLIP's vocabulary begins with them, and
    the merges that make whole words of them come with the weights.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        with config_errors("CLIP's text tower"):
            config = CLIPTextConfig(**settings)
            require_heads("hidden_size of CLIP's text tower", config.hidden_size, config.num_attention_heads)
            self.tower = CLIPTextModelWithProjection(config)
        self.tokenizer: Any = _byte_tokenizer(config)

    @property
    def output_dim(self) -> int:
        """P."""
        return int(self.tower.config.projection_dim or 0)

    def restore(self, directory: Path) -> None:
        """Take the tokenizer that lies in this directory, if there is one."""
        if (directory / "tokenizer_config.json").is_file():
            self.tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)

    def encode_tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts to (B, 1, P) and a mask of ones; each distinct text once."""
        distinct = list(dict.fromkeys(texts))
        found = self.tokenizer(
            distinct,
            padding=True,
            truncation=True,
            max_length=self.tower.config.max_position_embeddings,
            return_tensors="pt",
        )
        device = self.tower.text_projection.weight.device
        ids, mask = found["input_ids"].to(device), found["attention_mask"].to(device)
        rows = self.tower(input_ids=ids, attention_mask=mask).text_embeds[[distinct.index(text) for text in texts]]
        return rows[:, None], torch.ones(len(rows), 1, dtype=torch.long, device=device)


def load_clip(source: str, vision: ClipVision, text: ClipText) -> None:
    """Take both towers' weights and the tokenizer from a directory or the hub.

    Raises:
        ResourceMissing: nothing there.
        ConfigError: weights of another size.
    """
    try:
        weights = CLIPModel.from_pretrained(source, use_safetensors=True).state_dict()
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except OSError as error:
        raise ResourceMissing(
            f"no CLIP at {source!r} ({error}); give the path of a directory written by save_pretrained"
        ) from error
    for tower in (vision.tower, text.tower):
        wanted = tower.state_dict()
        try:
            tower.load_state_dict({name: weights[name] for name in wanted})
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"the CLIP at {source!r} is of another size than the config: {error}") from error
    text.tokenizer = tokenizer


def _byte_tokenizer(config: CLIPTextConfig) -> CLIPTokenizer:
    bos, eos = config.bos_token_id, config.eos_token_id
    if (
        not isinstance(bos, int)
        or not isinstance(eos, int)
        or not 512 <= min(bos, eos) <= max(bos, eos) < config.vocab_size
    ):
        raise ConfigError(
            f"CLIP's vocab_size {config.vocab_size} with bos {bos} and eos {eos}: there must be 514 words or more, and "
            "those two behind the first 512"
        )
    alphabet = sorted(ByteLevel.alphabet())
    # The published order: printable bytes first, then the others, which stand for themselves plus 256.
    alphabet = sorted(alphabet, key=lambda character: (ord(character) >= 256, ord(character)))
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {f"{character}</w>": 256 + index for index, character in enumerate(alphabet)}
    vocabulary |= {"<|startoftext|>": bos, "<|endoftext|>": eos}
    return CLIPTokenizer(vocab=vocabulary, merges=[])
