"""The rows of a square root of the Gauss-Newton matrix, read from any network and proved."""
