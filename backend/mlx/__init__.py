"""mlx-lm as a backend: it batches by itself, we decide who runs, what is drawn and when it ends."""
