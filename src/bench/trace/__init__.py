"""The training step on fake tensors, and the replay of the CUDA caching allocator."""
