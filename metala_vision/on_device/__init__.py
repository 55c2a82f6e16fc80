"""`data.on_device`: all images decoded once, kept on the device as bytes and augmented there."""

from .loaders import create_batches

__all__ = ["create_batches"]
