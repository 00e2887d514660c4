"""The demo: a CNN → LSTM learns which digit a short video shows and which way it moves.

Run it with ``python -m cnnrnn_ext demo``; it needs the packages of the ``demo`` extra.
"""


class DemoError(Exception):
    """Something the user can put right; the message says what, and is all they need to see."""
