"""Attention and the steps between matrix products, in torch and in Triton."""
