"""bge_core: fine-tune BGE text-embedding models with a loop that one person can read."""

__version__ = "0.1.0"


class UserError(ValueError):
    """The user's input or settings are at fault: the message names field, value and remedy; the stage exits with 2."""
