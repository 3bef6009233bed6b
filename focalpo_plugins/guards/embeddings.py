"""Refuses token ids for which a model has no embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InvalidValue
from . import messages


def check(
    embeddings: Mapping[str, int | None],
    tokenizer: Any,
    largest_id: Callable[[], int],
    *,
    say: bool,
) -> None:
    """Refuse data with a token for which a model has no embedding.

    If a model has fewer embeddings than the tokenizer has tokens, but enough for the data, this
    only warns.

    Args:
        embeddings: number of embeddings by the name of the model, ``policy`` or ``reference``; None
            if it isn't known.
        largest_id: returns the largest token id in the data; called only if a model has too few.
        say: whether this process writes the warning.

    Raises:
        ValueError: the data have a token without an embedding.
    """
    tokens = len(tokenizer)
    few = {name: rows for name, rows in embeddings.items() if rows is not None and rows < tokens}
    if not few:
        return
    largest = max(largest_id(), tokenizer.pad_token_id or 0)
    for name, rows in few.items():
        if largest >= rows:
            raise InvalidValue(
                f"the {name} must have an embedding for each token of the data, got {rows} "
                f"embeddings and the token id {largest}: the tokenizer has {tokens} tokens. Call "
                f"resize_token_embeddings({tokens}) on policy and reference before training, or "
                "use the tokenizer that was saved with the model."
            )
    if say:
        named = ", ".join(f"the {name} has {rows} embeddings" for name, rows in few.items())
        messages.say(
            f"warning: {named}, but the tokenizer has {tokens} tokens. No checked pair has a token "
            "without an embedding."
        )
