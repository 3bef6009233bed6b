"""Checks at the start of a run: the margins of its first step, and the models' embeddings.

If the policy starts as its reference and a margin is not 0, something is wrong: for example, the
reference is not the intended one.  If all margins of a resumed run are 0, something is wrong too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidValue
from .messages import say

#: Largest difference of two log-probs of a sequence that rounding explains, in nats: in float32,
#: and below float32.
ROUNDING = (0.01, 1.0)
#: Largest margin of a resumed run's first step, as a share of the mean margin that was logged last
#: before, from which the checkpoint's weights can't have been loaded.
_LOST = 0.01


def check_first_margins(largest: float, beta: float, narrow: bool) -> None:
    """Print the largest margin of the first step, and warn if rounding can't explain it.

    Call it on one rank only, and only if nothing but rounding can make a margin.

    Args:
        largest: largest absolute reward margin of all pairs on all ranks.
        beta: the factor in the margins.
        narrow: whether the model computes in 16 bits.
    """
    nats = largest / beta
    if nats <= ROUNDING[narrow]:
        say(f"first step: policy and reference agree, largest margin {largest:.2g}.")
        return
    say(
        "warning: at the first step every margin should be 0, as the policy starts as its "
        f"reference, got {largest:.2g} at most, {nats:.2g} nats. Look for a reference other than "
        "the intended one, weights that were changed after they were loaded, an adapter that does "
        "not start at 0, dropout, NEFTune's noise, a wrong attention mask, or packing without an "
        "attention for it."
    )


def check_resumed_margins(
    largest: float, history: Sequence[Mapping[str, Any]], checkpoint: str
) -> None:
    """Warn if the policy of a resumed run is its reference although it had been trained.

    Call it on one rank only.

    Args:
        largest: largest absolute reward margin of the first step's pairs on all ranks.
        history: what the checkpoint's run has logged.
        checkpoint: the checkpoint, for the message.
    """
    logged = [entry for entry in history if "rewards/margins" in entry]
    before = abs(logged[-1]["rewards/margins"]) if logged else 0.0
    # The first step's margins are 0 anyway; its learning rate tells if anything was learnt.
    at_first = not logged or logged[-1]["step"] == 1 and logged[-1].get("learning_rate") != 0
    if largest < _LOST * before or largest == 0 and before == 0 and at_first:
        was = f", and {before:.2g} on average when {checkpoint} was saved" if before else ""
        say(
            f"warning: at the first step after resuming the largest margin is {largest:.2g}{was}: "
            f"the policy is its own reference. The weights of {checkpoint} were not loaded, or the "
            "reference is that checkpoint itself. transformers doesn't load the trained adapter "
            "from a checkpoint with a folder `ref`: to resume such a run, give the policy as "
            f"PeftModel.from_pretrained(BASE_MODEL, {checkpoint!r}, is_trainable=True)."
        )


def check_embeddings(embeddings: Mapping[str, int], tokens: int, largest: int) -> str:
    """Refuse token ids for which a model has no embedding.

    Args:
        embeddings: number of embeddings by the name of the model, ``policy`` or ``reference``.
        tokens: number of the tokenizer's tokens.
        largest: the largest token id in the data, the padding included.

    Returns:
        A warning if a model has fewer embeddings than the tokenizer has tokens, but the data have
        none of the others; else an empty text.

    Raises:
        ValueError: the data have a token without an embedding.
    """
    few = {name: rows for name, rows in embeddings.items() if rows < tokens}
    for name, rows in few.items():
        if largest >= rows:
            raise InvalidValue(
                f"the {name} must have an embedding for each token of the data, got {rows} "
                f"embeddings and the token id {largest}: the tokenizer has {tokens} tokens. Call "
                f"resize_token_embeddings({tokens}) on policy and reference before training, or "
                "take the tokenizer that was saved with the model."
            )
    if not few:
        return ""
    named = ", ".join(f"the {name} has {rows} embeddings" for name, rows in few.items())
    return f"warning: {named}, and the tokenizer {tokens} tokens; no pair checked has the others."
