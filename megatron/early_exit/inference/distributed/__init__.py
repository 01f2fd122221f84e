"""A model divided over processes, by tensor parallelism and over pipeline stages."""
