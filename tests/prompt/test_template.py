from dataclasses import dataclass

import pytest

from internvl3_mlx.errors import ConfigError, PromptError
from internvl3_mlx.prompt.messages import (
    DEFAULT_SYSTEM,
    ImageSegment,
    Message,
    MessageMedia,
    TextSegment,
)
from internvl3_mlx.prompt.template import InternVLTemplate, load_template

SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)


@dataclass(frozen=True)
class Config:
    template: str | None = "internvl2_5"
    system_message: str | None = None
    layout: str = "original"


def written(segments) -> str:
    """The prompt as chat() would hold it before it puts context tokens in."""
    return "".join(s.text if isinstance(s, TextSegment) else f"<image:{s.tiles}>" for s in segments)


def render(*turns: Message, system=None, own=None) -> str:
    return written(InternVLTemplate(own).render(turns, system))


def test_the_whole_prompt_of_one_image():
    assert render(Message("user", "Describe it.", (MessageMedia((13,)),))) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n<image:13>\nDescribe it.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_whole_prompt_of_a_video():
    assert render(Message("user", "q", (MessageMedia((1, 1), "video"),)), system="") == (
        "<|im_start|>user\nFrame1: <image:1>\nFrame2: <image:1>\nq<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_history_keeps_answers_and_every_turns_images():
    turns = (
        Message("user", "Hello"),
        Message("assistant", "Hi <image>."),
        Message("user", "And this?", (MessageMedia((3,)),)),
        Message("assistant", ""),
        Message("user", "Compare.", (MessageMedia((1,)), MessageMedia((2,)))),
    )
    assert render(*turns, system="") == (
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi <image>.<|im_end|>\n"
        "<|im_start|>user\n<image:3>\nAnd this?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nImage-1: <image:1>\nImage-2: <image:2>\nCompare.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_published_system_text_is_the_default():
    assert DEFAULT_SYSTEM == SYSTEM


@pytest.mark.parametrize(
    ("system", "own", "expected"),
    [
        (None, None, SYSTEM),
        (None, "", SYSTEM),
        (None, "Be brief.", "Be brief."),
        ("Be a cat.", "Be brief.", "Be a cat."),
    ],
)
def test_the_callers_system_text_goes_before_the_models(system, own, expected):
    prompt = render(Message("user", "q"), system=system, own=own)
    assert prompt.startswith(f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\nq")


def test_an_empty_system_text_leaves_the_part_out():
    assert render(Message("user", "q"), system="", own="Be brief.").startswith(
        "<|im_start|>user\nq"
    )


def test_typed_text_is_told_from_the_templates():
    segments = InternVLTemplate().render(
        (Message("user", "q", (MessageMedia((2,)),)),), "Be brief."
    )
    assert segments == [
        TextSegment("<|im_start|>system\n"),
        TextSegment("Be brief.", untrusted=True),
        TextSegment("<|im_end|>\n<|im_start|>user\n"),
        ImageSegment(2),
        TextSegment("\n"),
        TextSegment("q", untrusted=True),
        TextSegment("<|im_end|>\n<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "the conversation is empty; its last message must be the user's"),
        ((Message("assistant", "x"),), "ends with 'assistant'"),
    ],
)
def test_a_conversation_ends_with_the_user(turns, message):
    with pytest.raises(PromptError, match=message):
        InternVLTemplate().render(turns, None)


def test_the_named_template_is_used_though_a_jinja_one_lies_there(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("image {{ messages }}")
    assert load_template(Config(system_message="Be brief."), tmp_path) == InternVLTemplate(
        "Be brief."
    )


def test_without_name_or_jinja_the_prompt_is_the_published_one(tmp_path):
    assert load_template(Config(template=None), tmp_path) == InternVLTemplate(None)


def test_an_unknown_template_names_the_known(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"names the template 'phi3-chat', .* for images of its own; choose from internvl2_5",
    ):
        load_template(Config(template="phi3-chat"), tmp_path)
