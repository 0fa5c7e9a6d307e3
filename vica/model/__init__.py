"""The network: positions and packs of tokens, two flows through the layers (mask, accel), cache, loss."""
