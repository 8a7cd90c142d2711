"""Tasks and the engines that run them: threads, batches, memory budget, CUDA streams, Ray, cost estimates."""
