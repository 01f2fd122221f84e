"""Plans of training runs on paper: which layout of a model is the fastest that fits."""
