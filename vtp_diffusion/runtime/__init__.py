"""Basis of every program: configuration, command line, processes, disk, precision, result files."""

__version__ = "0.1.0"
