"""Models: kinds of tensors, a forward layer by layer, second moments of inputs, changes of layers and vocabulary."""
