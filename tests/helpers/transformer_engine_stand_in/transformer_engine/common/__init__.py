"""What Transformer Engine's frameworks share."""

from transformer_engine.common import recipe as recipe
