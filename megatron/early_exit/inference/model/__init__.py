"""A model's segments over caches of keys and values: tensors in, tensors out."""
