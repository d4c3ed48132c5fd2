"""The model: pure tensors, no files, no processes."""

from mae_dist.model.mae import MAE, MAEConfig, MAEOutput

__all__ = ["MAE", "MAEConfig", "MAEOutput"]
