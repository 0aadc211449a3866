"""What every program stands on: configuration, command line, processes, disk, precision, result files."""

__version__ = "0.1.0"
