"""The package's version, also written into compiled models."""

VERSION = "0.1.0"
