"""From a name to a model: find or fetch the folder, read every tensor, fold for inference."""
