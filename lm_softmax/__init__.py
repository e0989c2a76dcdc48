"""Output heads for large vocabularies, and a Lightning framework around them."""

__version__ = "0.1.0"
