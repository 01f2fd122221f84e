"""What goes into a folder with exits as it is: its own model for transformers.

These files import torch and transformers and nothing else, for they leave this package.
"""
