"""LLaMA-Factory: ``pref_loss: focalpo`` and ``focalpo_gamma`` in the YAML.

Nothing here imports LLaMA-Factory before it has imported its own arguments.
"""

#: The key that asks for shared prompts, for any of our losses.
SHARED = "focalpo_shared_prompts"
#: The key that asks for balanced batches, for any of our losses.
BALANCED = "focalpo_balanced_batches"
#: The key that asks for a precomputed reference, for any of our losses.
PRECOMPUTE = "focalpo_precompute_ref"
#: The key of the folder of its file.
PRECOMPUTE_DIR = "focalpo_precompute_dir"
#: The key that lets a run resume a checkpoint of another loss.
ALLOW_CHANGED = "focalpo_allow_changed"
#: The key that lets a run train on data of which more than half has a fault.
ALLOW_DATA = "focalpo_allow_data"
#: The keys that are true or false.
SWITCHES = (SHARED, BALANCED, PRECOMPUTE, ALLOW_CHANGED, ALLOW_DATA)
#: The key for the margin that a loss is computed from, for any of our losses.
MARGIN = "focalpo_margin"
#: The keys that all our losses share.
COMMON_KEYS = (*SWITCHES, PRECOMPUTE_DIR, MARGIN)
#: For each margin, LLaMA-Factory's own loss of it, which its other arguments are checked against.
MARGINS = {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo"}
