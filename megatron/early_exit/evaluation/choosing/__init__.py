"""Chooses a rule of early exit that provably keeps a wished quality, by calibration on texts."""
