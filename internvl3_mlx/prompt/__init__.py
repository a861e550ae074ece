"""From messages to token ids and back: templates, tokenizers, V2PE positions, boxes."""
