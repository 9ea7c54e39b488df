"""What transformers knows of an export of memlm before it loads it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from memlm.exported import MODEL_TYPE


class MemlmConfig(PreTrainedConfig):
    """The ``config.json`` of an export.

    Args:
        version: Version of memlm that wrote it.
        config: The plain configuration of the model, as `memlm.models.base.LanguageModel.config`.
        vocab_size: Ids that the model knows.
        hidden_size: Its width.
        num_hidden_layers: Its layers.
        kwargs: What any configuration of transformers takes.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        version: str = "",
        config: dict[str, Any] | None = None,
        vocab_size: int = 0,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        self.version, self.config = version, config or {}
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)


AutoConfig.register(MODEL_TYPE, MemlmConfig, exist_ok=True)
