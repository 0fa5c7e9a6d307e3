"""What `vica bench` measures and counts: speed, memory and FLOPs, beside transformers on the same weights."""
