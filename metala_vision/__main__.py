"""`python -m metala_vision` is `metala-vision`."""

from .cli import entry_point

if __name__ == "__main__":
    entry_point()
