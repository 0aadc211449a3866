"""The training loop: checkpoints, EMA, compilation, CUDA graphs, rates."""
