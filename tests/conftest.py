import torch

# Tiny tensors gain nothing from more threads, and on a busy machine lose a lot.
torch.set_num_threads(1)
