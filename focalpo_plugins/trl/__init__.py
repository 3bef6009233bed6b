"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``."""

from .checks import check_host, check_loss_types
from .trainer import FocalPOConfig, FocalPOTrainer, PairwiseLossMixin

__all__ = ["FocalPOConfig", "FocalPOTrainer", "PairwiseLossMixin", "check_host", "check_loss_types"]
