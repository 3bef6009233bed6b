"""A model that stands in for the trained one while only data is prepared."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM


def stand_in(vocabulary: int, name: str = "") -> LlamaForCausalLM:
    """The smallest model that a trainer can be built with, to prepare data as the trainer does."""
    config: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    # The class also takes a name, which is not among its typed fields.
    config |= {"vocab_size": vocabulary, "name_or_path": name}
    return LlamaForCausalLM(LlamaConfig(**config))
