"""Recipes: whole jobs on a user's files, made of the other parts. The command runs them."""
