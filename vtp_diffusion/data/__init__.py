"""Images, captions and latents: readers, data sets, their order and batches."""
