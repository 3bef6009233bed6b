"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``."""

from .trainer import FocalPOConfig, FocalPOTrainer, PairwiseLossMixin, check_host, check_loss_types

__all__ = ["FocalPOConfig", "FocalPOTrainer", "PairwiseLossMixin", "check_host", "check_loss_types"]
