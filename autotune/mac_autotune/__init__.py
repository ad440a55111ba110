"""Tuning and quality measurement for mac-kernels."""
