"""InternViT, the projector and the decoder, combined in ``internvl``; caches and adapters."""
