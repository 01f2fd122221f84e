"""Training with exits: the deferred loss, its weights, its log, and the data it needs."""
