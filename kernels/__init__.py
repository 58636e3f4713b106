"""Triton rooms of the ops: one file per family, one function per op, named and called as the op is."""
