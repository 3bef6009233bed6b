"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``."""

from .trainer import FocalPOConfig, FocalPOTrainer, PairwiseLossMixin, check_host

__all__ = ["FocalPOConfig", "FocalPOTrainer", "PairwiseLossMixin", "check_host"]
