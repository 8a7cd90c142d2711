"""A model as it is loaded and run: what its tensors are, layer by layer, moments of its inputs."""
