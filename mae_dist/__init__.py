"""Masked Autoencoder (He et al., CVPR 2022) pretraining on clusters."""

__version__ = "0.1.0"
