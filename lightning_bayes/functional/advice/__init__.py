"""Advice on batch size and learning rate: moves, checks and their wording."""
