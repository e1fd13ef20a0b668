"""The run whose memory is forecast: tensors without data, and the allocator that they would meet."""
