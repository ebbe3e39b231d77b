"""The one error of the model layer that a user can cause."""


class ModelError(ValueError):
    """A model, method or input that does not fit. One line: what, where, expected, found."""
