"""Rows that outlive their batch, as factors or as they are, and products with them."""
