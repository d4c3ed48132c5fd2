"""The run: what is trained, for how long, saved where, and what happens when something goes wrong."""

from mae_dist.train.options import TrainConfig

__all__ = ["TrainConfig"]
