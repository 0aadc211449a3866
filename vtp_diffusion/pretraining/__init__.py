"""Pre-training of VTP: one file an objective, and the joint loss."""
