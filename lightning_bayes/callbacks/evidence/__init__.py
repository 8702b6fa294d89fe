"""Parts of `LaplaceEvidence`: how it evaluates, and under which keys it logs."""
