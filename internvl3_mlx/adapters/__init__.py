"""LoRA and DoRA adapters: read, attached, merged, written."""
