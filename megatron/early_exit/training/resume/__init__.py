"""What a run starts from: checkpoints, and whether they fit the model."""
