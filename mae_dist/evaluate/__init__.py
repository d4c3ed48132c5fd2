"""What the encoder is worth."""
