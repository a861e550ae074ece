"""Training data: read, validated, preprocessed and laid into batches."""
