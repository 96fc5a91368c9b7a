"""The Valley model as Hugging Face knows models: configuration, model, processor, and the prompt they share."""
