"""Types of command-line options, for argparse: each raises ValueError for what it does not take."""


def positive(text):
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def natural(text):
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def positive_number(text):
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value
