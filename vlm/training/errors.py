"""The one error of training that a user can cause or must act on."""


class TrainingError(ValueError):
    """Training cannot start or go on. One line: what, where, expected, found."""
