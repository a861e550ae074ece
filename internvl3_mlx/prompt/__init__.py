"""From turns to token ids and back: templates, tokens, V2PE positions, boxes."""
