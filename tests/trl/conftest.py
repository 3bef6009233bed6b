"""TRL, on a tiny model."""

from __future__ import annotations

import pytest
import tiny_trl
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_trl.tokenizer()
