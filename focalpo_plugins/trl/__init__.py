"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``."""

from .config import FocalPOConfig
from .seam import check_host, check_loss_types
from .trainer import FocalPOTrainer, PairwiseLossMixin

__all__ = ["FocalPOConfig", "FocalPOTrainer", "PairwiseLossMixin", "check_host", "check_loss_types"]
