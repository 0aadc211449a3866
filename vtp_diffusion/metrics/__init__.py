"""Formulae and feature networks: distances, scores, accuracies."""
