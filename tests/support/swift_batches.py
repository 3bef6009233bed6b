"""For `--external_plugins`: each rank writes its training batches beside the model, as lists of pairs,
which are the token ids of the chosen and the rejected sequence."""

import json
import os
from pathlib import Path

from swift.rlhf_trainers import DPOTrainer

of_host = DPOTrainer.training_step


def step(self, model, inputs, *args, **kwargs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    sequences = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    half = len(sequences) // 2
    pairs = list(zip(sequences[:half], sequences[half:], strict=True))
    folder = Path(self.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"batches{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
        file.write(json.dumps(pairs) + "\n")
    return of_host(self, model, inputs, *args, **kwargs)


DPOTrainer.training_step = step
