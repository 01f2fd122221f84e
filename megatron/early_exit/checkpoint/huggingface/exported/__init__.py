"""Files that are copied unchanged into an exported folder with exits: its model for transformers.

They import only torch and transformers, because they are used without this package.
"""
