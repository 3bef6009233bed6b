"""Imported first, writes into the folder ``BATCHES`` each rank's batches, as lists of pairs, which
are the token ids of the chosen and the rejected sequence."""

import json
import os
from pathlib import Path

from transformers import Trainer

_host_step = Trainer.training_step
_file = Path(os.environ["BATCHES"], f"batches{os.environ.get('RANK', '0')}.jsonl")


def _step(self, model, inputs, *args, **kwargs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    sequences = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    half = len(sequences) // 2
    with _file.open("a") as file:
        file.write(json.dumps(list(zip(sequences[:half], sequences[half:], strict=True))) + "\n")
    return _host_step(self, model, inputs, *args, **kwargs)


Trainer.training_step = _step
