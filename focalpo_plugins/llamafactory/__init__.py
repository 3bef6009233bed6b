"""LLaMA-Factory: ``pref_loss: focalpo`` and ``focalpo_gamma`` in the YAML.

Nothing here imports LLaMA-Factory before it has imported its own arguments.
"""

#: For each margin, LLaMA-Factory's own loss of it, which its other arguments are checked against.
MARGINS = {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo"}
