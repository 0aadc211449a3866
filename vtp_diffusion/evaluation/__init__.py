"""Measuring: image sources, one pass over them, probes, validation, the report."""
