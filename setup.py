"""Lets tools that predate pyproject.toml build the project; everything is declared there."""

from setuptools import setup

setup()
