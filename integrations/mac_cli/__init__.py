"""The ``mac-kernels`` command."""
