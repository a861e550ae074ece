"""The families of language models, as a table: their names in config files, and their parts.

A family that differs from a known one in these alone is one more row. What a row names is built by
``models.decoder``, which knows no family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers in ``layer_types``


@dataclass(frozen=True, kw_only=True)
class ExpertsFamily:
    """The mixture of experts of a family: the keys of its config, and the names of its parts.

    ``count``: the key to write, then others that transformers' versions write. ``router``,
    ``module``: the router's and the stacked experts' names in a layer's MLP, as mlx-lm has them.
    ``activation``: a name of ``models.experts.ACTIVATIONS``. ``renormalize``: the key that says
    whether the weights of the chosen experts are made to sum to 1; None: they always are.
    """

    count: tuple[str, ...]
    per_token: str = "num_experts_per_tok"
    intermediate_size: str
    renormalize: str | None = None
    router: str
    module: str
    bias: bool = False
    activation: str = "swiglu"


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """One family. Names: of its class in the original layout, and of its type in both layouts.

    ``qkv_bias``: q, k and v have biases unless a file says otherwise; None where only the tensors
    tell. ``o_bias``: so has the projection of the output. ``qk_norm``: each head of q and k is
    normalized before it is rotated. ``sinks``: each head has an attention sink. ``sliding``: layers
    may attend to a window. ``defaults``: what transformers' class assumes for a key that a file
    omits, where that is not ``TextConfig``'s. ``remote_code``: the repository with the published
    code of the original layout. ``v2pe``: the published models were trained with V2PE.
    """

    title: str
    architecture: str
    original_type: str
    hf_type: str
    hf_architecture: str
    aliases: tuple[str, ...] = ()
    qkv_bias: bool | None = False
    o_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    sliding: bool = False
    experts: ExpertsFamily | None = None
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
        "qwen3_moe": DecoderFamily(
            title="Qwen3-MoE",
            architecture="Qwen3MoeForCausalLM",
            original_type="qwen3_moe",
            hf_type="qwen3_moe",
            hf_architecture="Qwen3MoeForCausalLM",
            qk_norm=True,
            experts=ExpertsFamily(
                count=("num_experts", "num_local_experts"),
                intermediate_size="moe_intermediate_size",
                renormalize="norm_topk_prob",
                router="gate",
                module="switch_mlp",
            ),
            remote_code="OpenGVLab/InternVL3_5-30B-A3B",
        ),
        "gpt_oss": DecoderFamily(
            title="GPT-OSS",
            architecture="GptOssForCausalLM",
            original_type="gpt_oss",
            hf_type="gpt_oss",
            hf_architecture="GptOssForCausalLM",
            qkv_bias=True,
            o_bias=True,
            sinks=True,
            sliding=True,
            experts=ExpertsFamily(
                count=("num_local_experts", "num_experts"),
                intermediate_size="intermediate_size",
                router="router",
                module="experts",
                bias=True,
                activation="clamped_swiglu",
            ),
            remote_code="OpenGVLab/InternVL3_5-GPT-OSS-20B-A4B-Preview",
            defaults=MappingProxyType(
                {
                    "head_dim": 64,
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 150000.0,
                    "sliding_window": 128,
                    "max_position_embeddings": 131072,
                }
            ),
        ),
    }
)
FAMILY_OF_NAME = {name: family for family, row in FAMILIES.items() for name in row.names}
