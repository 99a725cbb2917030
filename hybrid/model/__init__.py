"""megatron-core's `HybridModel` with this project's layers and kernels; `model.build.build_model` is the way in."""
