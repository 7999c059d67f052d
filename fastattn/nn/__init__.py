"""Modules: learned feature maps."""
