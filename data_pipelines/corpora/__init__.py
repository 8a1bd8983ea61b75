"""Recipes that make shards: `starter` from registry packages, `shapes` drawn from a seed without a network."""
