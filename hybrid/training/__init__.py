"""The training of a run, its checkpoints and its files; `training.loop.train` is the way in."""
