"""Numerical checks: tolerances, the self-test of every op, patched models, results files."""
