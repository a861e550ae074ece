"""The families of language models, as a table: their names in config files, and their parts.

A family that differs from a known one in these alone is one more row. What a row names is built by
``models.decoder``, which knows no family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """One family. Names: of its class in the original layout, and of its type in both layouts.

    ``qkv_bias``: q, k and v have biases unless a file says otherwise; None where only the tensors
    tell. ``qk_norm``: each head of q and k is normalized before it is rotated. ``defaults``: what
    transformers' class assumes for a key that a file omits, where that is not ``TextConfig``'s.
    ``remote_code``: the repository with the published code of the original layout. ``v2pe``: the
    published models were trained with V2PE.
    """

    title: str
    architecture: str
    original_type: str
    hf_type: str
    hf_architecture: str
    aliases: tuple[str, ...] = ()
    qkv_bias: bool | None = False
    qk_norm: bool = False
    v2pe: bool = False
    remote_code: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which a config file may call the family."""
        types = (self.architecture, self.original_type, self.hf_architecture, self.hf_type)
        return (*types, *self.aliases)


FAMILIES: Mapping[str, DecoderFamily] = MappingProxyType(
    {
        "qwen2": DecoderFamily(
            title="Qwen2.5",
            architecture="Qwen2ForCausalLM",
            original_type="qwen2",
            hf_type="qwen2",
            hf_architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            v2pe=True,
            remote_code="OpenGVLab/InternVL3-8B",
        ),
        "internlm3": DecoderFamily(
            title="InternLM3",
            architecture="InternLM2ForCausalLM",
            original_type="internlm2",
            hf_type="llama",
            hf_architecture="LlamaForCausalLM",
            aliases=("internlm3", "InternLM3ForCausalLM"),
            qkv_bias=None,
            v2pe=True,
            remote_code="OpenGVLab/InternVL3-9B",
        ),
        "qwen3": DecoderFamily(
            title="Qwen3",
            architecture="Qwen3ForCausalLM",
            original_type="qwen3",
            hf_type="qwen3",
            hf_architecture="Qwen3ForCausalLM",
            qk_norm=True,
            remote_code="OpenGVLab/InternVL3_5-8B",
            defaults=MappingProxyType({"head_dim": 128}),
        ),
    }
)
FAMILY_OF_NAME = {name: family for family, row in FAMILIES.items() for name in row.names}
