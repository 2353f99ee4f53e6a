"""Figures and proofs: bench, and the losslessness check behind `dspark verify`."""
