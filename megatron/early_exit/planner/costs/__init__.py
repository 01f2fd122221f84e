"""What the stages of a pipeline cost: of a model, its layout, and a data sheet or a profile."""
