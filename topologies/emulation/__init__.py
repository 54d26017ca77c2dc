"""Brings a topology up on this machine, measures it before it is trusted, and takes exactly that down again."""
