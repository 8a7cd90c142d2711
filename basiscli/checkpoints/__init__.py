"""What goes in and out: sources, lazy views of tensors, and the shard writer."""
