"""ms-swift: ``swift rlhf --rlhf_type dpo --loss_type focalpo --focalpo_gamma 0.05``."""
