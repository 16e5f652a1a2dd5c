"""Recipes: the scheme and method of each weight. The named recipes are YAML files in this folder."""
