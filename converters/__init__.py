"""Checkpoints of any format, to and from one naming of weights; `converters.convert` is the way in."""
