"""The towers: InternViT, the projector and the decoder, joined in ``internvl``."""
