"""Recipes: which scheme and method each weight gets. The named ones lie here as YAML."""
