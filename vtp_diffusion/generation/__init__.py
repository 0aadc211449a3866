"""LightningDiT: the method, its inputs, the pipeline, sampling and export."""
