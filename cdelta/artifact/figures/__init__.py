"""Figures of the artifact, by what they show: saved tables in, `matplotlib` figures out."""
