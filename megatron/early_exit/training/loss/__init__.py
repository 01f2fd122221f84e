"""The exits' losses: deferred to the backward pass, in chunks, weighted, measured."""
