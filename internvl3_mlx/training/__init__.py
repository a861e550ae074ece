"""Fine-tuning: rows to samples, samples to one packed row, a loss, and the loop around them."""
