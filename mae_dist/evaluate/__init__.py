"""What the encoder is worth."""

from mae_dist.evaluate.checkpoints import load

__all__ = ["load"]
