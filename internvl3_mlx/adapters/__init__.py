"""LoRA and DoRA adapters: read, attach, merge and write them."""
