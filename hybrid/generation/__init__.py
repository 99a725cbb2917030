"""Text from a model: weights, states, the forward pass, sampling; `generation.generator.Generator` is the way in."""
