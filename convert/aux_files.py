"""Auxiliary files of a checkpoint: tokenizers, chat templates, processor configs, licenses."""

import glob
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.keymap import LANGUAGE_LAYOUT
from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD
from internvl3_mlx.config.foreign import visible_files
from internvl3_mlx.convert.plan import ConversionPlan
from internvl3_mlx.convert.tokenizer_export import build_fast_tokenizer
from internvl3_mlx.json_files import read_optional_json
from internvl3_mlx.prompt.harmony import HARMONY_SYSTEM
from internvl3_mlx.prompt.jinja_template import JinjaTemplate
from internvl3_mlx.prompt.messages import DEFAULT_SYSTEM
from internvl3_mlx.prompt.template import HarmonyTemplate, load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.write_guards import MODEL_FOLDER, FolderKind

COPIED_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
CODE_PATTERN = "*.py"  # copied for the original layout only; never run here
EXCLUDED_FILES = {"config.json", "adapter_config.json"}
IMAGE_FILES = {
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
}
VIDEO_TOKEN = "<video>"
HF_SPECIAL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": VIDEO_TOKEN,
}
HF_CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and add_default_system | default(true) -%}
{{ SYSTEM_TURN }}
{%- endif -%}
{%- for message in messages -%}
{{ MESSAGE_START }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<IMG_CONTEXT>\\n' }}
{%- elif part['type'] == 'video' -%}
{{ '<video>\\n' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ MESSAGE_END }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ ANSWER_START }}
{%- endif -%}
"""
IS_ANSWER = "message['role'] == 'assistant'"
CHATML_MARKS = {  # what the capitals of HF_CHAT_TEMPLATE stand for
    "SYSTEM_TURN": r"'<|im_start|>system\n' + SYSTEM + '<|im_end|>\n'",
    "MESSAGE_START": r"'<|im_start|>' + message['role'] + '\n'",
    "MESSAGE_END": r"'<|im_end|>\n'",
    "ANSWER_START": r"'<|im_start|>assistant\n'",
}
HARMONY_MARKS = {
    "SYSTEM_TURN": "'<|start|>system<|message|>' + SYSTEM + '<|end|>'",
    "MESSAGE_START": "'<|start|>' + message['role'] + "
    f"('<|channel|>final' if {IS_ANSWER} else '') + '<|message|>'",
    "MESSAGE_END": f"'<|return|>' if {IS_ANSWER} else '<|end|>'",
    "ANSWER_START": "'<|start|>assistant'",
}


def replaceable_folder(source: Path) -> FolderKind:
    """Return what an older target may hold: a model's files, and what is copied from ``source``."""
    copied = (
        glob.escape(file.name)
        for pattern in (*COPIED_PATTERNS, CODE_PATTERN)
        for file in visible_files(source, pattern)
    )
    return replace(MODEL_FOLDER, files=(*MODEL_FOLDER.files, *copied))


def write_aux_files(plan: ConversionPlan, tokenizer: Tokenizer, target: Path) -> None:
    """Copy everything but weights and configs, and make a ``tokenizer.json`` if there is none."""
    is_text = plan.layout == LANGUAGE_LAYOUT
    patterns = (*COPIED_PATTERNS, CODE_PATTERN) if plan.layout == "original" else COPIED_PATTERNS
    for pattern in patterns:
        for file in visible_files(plan.source, pattern):
            if should_copy(file) and not (file.name in IMAGE_FILES and is_text):
                shutil.copyfile(file, target / file.name)
    if not (target / "tokenizer.json").exists() and (
        tokenizer_json := build_fast_tokenizer(plan.source)
    ):
        write_json(target / "tokenizer.json", tokenizer_json)
    if is_text:
        write_language_files(plan, tokenizer, target)
    elif plan.layout == "hf" and plan.config.layout != "hf":
        write_hf_files(plan, tokenizer, target)


def should_copy(file: Path) -> bool:
    return (
        file.name not in EXCLUDED_FILES and not file.name.endswith(".index.json") and file.is_file()
    )


def write_language_files(plan: ConversionPlan, tokenizer: Tokenizer, target: Path) -> None:
    """Write the files by which transformers, and so mlx-lm, reads the tokenizer and a chat."""
    write_chat_template(plan, target, begin_text(tokenizer))
    write_generation_config(tokenizer, target)
    settings = read_optional_json(target / "tokenizer_config.json")
    write_json(target / "tokenizer_config.json", without_code(settings))


def begin_text(tokenizer: Tokenizer) -> str:
    """Return what a chat template begins with: the BOS token, which mlx-lm does not add by itself.

    transformers' processor does.
    """
    added = tokenizer.added.items()
    names = [name for name, token in added if token.id == tokenizer.bos_id]
    return f"{{{{- {json.dumps(names[0])} -}}}}\n" if names else ""


def write_hf_files(plan: ConversionPlan, tokenizer: Tokenizer, target: Path) -> None:
    """Write the files that transformers' InternVLProcessor reads."""
    size = {"height": plan.config.force_image_size, "width": plan.config.force_image_size}
    pixels = {
        "size": size,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "processor_class": "InternVLProcessor",
    }
    tiles = {
        "crop_to_patches": True,
        "min_patches": plan.config.min_dynamic_patch if plan.config.dynamic_image_size else 1,
        "max_patches": plan.config.max_dynamic_patch if plan.config.dynamic_image_size else 1,
    }
    image = {"image_processor_type": "GotOcr2ImageProcessorFast", **pixels, **tiles}
    write_json(target / "preprocessor_config.json", image)
    video = {"video_processor_type": "InternVLVideoProcessor", **pixels}
    write_json(target / "video_preprocessor_config.json", video)
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": plan.config.num_image_token,
    }
    write_json(target / "processor_config.json", processor)
    write_chat_template(plan, target)
    write_generation_config(tokenizer, target)
    add_video_token(target)


def write_generation_config(tokenizer: Tokenizer, target: Path) -> None:
    """Keep the source's settings, and name every token that ends an answer.

    transformers looks for them here alone, the other layouts also in the tokenizer's files.
    """
    path = target / "generation_config.json"
    stops = sorted(tokenizer.stop_ids, key=lambda token: (token != tokenizer.im_end_id, token))
    ends = stops[0] if len(stops) == 1 else stops
    write_json(path, {**read_optional_json(path), "eos_token_id": ends})


def write_chat_template(plan: ConversionPlan, target: Path, begin: str = "") -> None:
    """Write the prompt that the source has: its own template, or the published one, system turn
    included, which transformers would not add. begin: what comes before one that has no BOS."""
    template = load_template(plan.config, plan.source)
    if isinstance(template, JinjaTemplate) and not plan.config.system_message:
        source = template.source
    else:
        is_harmony = isinstance(template, HarmonyTemplate)
        default = HARMONY_SYSTEM if is_harmony else DEFAULT_SYSTEM
        system = json.dumps(plan.config.system_message or default, ensure_ascii=False)
        source = HF_CHAT_TEMPLATE
        for mark, text in (HARMONY_MARKS if is_harmony else CHATML_MARKS).items():
            source = source.replace(mark, text)
        source = source.replace("SYSTEM", system)
    begin = "" if "bos_token" in source else begin
    (target / "chat_template.jinja").write_text(begin + source, encoding="utf-8")


def add_video_token(target: Path) -> None:
    """Name the image tokens the way transformers' processor expects them, and add ``<video>``.

    Its id is beyond the last embedding row, as in the published files: the processor replaces it
    before the model sees it.
    """
    settings = read_optional_json(target / "tokenizer_config.json")
    named = {"processor_class": "InternVLProcessor", "extra_special_tokens": HF_SPECIAL_TOKENS}
    write_json(target / "tokenizer_config.json", without_code({**settings, **named}))
    path = target / "tokenizer.json"
    content = read_optional_json(path)
    added = content.get("added_tokens", [])
    if content and all(token["content"] != VIDEO_TOKEN for token in added):
        last = max(
            [token["id"] for token in added] + list(content["model"]["vocab"].values()),
        )
        added.append(
            {
                "id": last + 1,
                "content": VIDEO_TOKEN,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": True,
            }
        )
        write_json(path, {**content, "added_tokens": added})


def without_code(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's settings that need no code of the source, nor its chat template."""
    kept = {key: x for key, x in settings.items() if key not in ("auto_map", "chat_template")}
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
