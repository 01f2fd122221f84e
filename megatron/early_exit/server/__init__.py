"""A text-generation server over the inference engine."""
