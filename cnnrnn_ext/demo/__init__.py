"""The demo: a CNN → LSTM learns which digit a short video shows and which way it moves.

Run it with ``python -m cnnrnn_ext demo``; it needs the packages of the ``demo`` extra.
"""

from cnnrnn_ext.recipes.options import UserError


class DemoError(UserError):
    """Raised by the demo: something the user can put right."""
