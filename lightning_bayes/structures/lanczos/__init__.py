"""The unbiased estimate for any size: a part that is known exactly, and random vectors for what it leaves."""
