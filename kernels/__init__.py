"""Triton rooms of the ops: one file per family, one function per op, named as the op is."""
