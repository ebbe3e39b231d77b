"""The one error of the data layer that a user can cause."""


class DataError(ValueError):
    """Bad input data. The message is one line: what, where (file, shard, key), expected, found."""
