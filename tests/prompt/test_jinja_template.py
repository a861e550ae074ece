import json
from dataclasses import dataclass

import pytest
from fixtures.tokenizers import write_qwen_tokenizer
from transformers import AutoTokenizer

from internvl3_mlx.errors import CheckpointError, PromptError
from internvl3_mlx.prompt.messages import ImageSegment, Message, MessageMedia, TextSegment
from internvl3_mlx.prompt.template import InternVLTemplate, load_template

# what native repositories ship: an image is its placeholder and a newline
NATIVE = """
{%- for message in messages -%}
    {{ '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for item in message['content'] %}
            {%- if item['type'] == 'image' %}
                {{- '<IMG_CONTEXT>\\n' }}
            {%- elif item['type'] == 'text' %}
                {{- item['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
WRAPPED = NATIVE.replace("<IMG_CONTEXT>\\n", "<img><IMG_CONTEXT></img>")
STRINGS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{# no image #}"
)
CONVERSATIONS = (
    (Message("user", "What?"),),
    (Message("user", ""),),
    (Message("user", "What?", (MessageMedia((7,)),)),),
    (Message("user", "\nWhat?", (MessageMedia((7,)),)),),
    (Message("user", "<image>\nWhat <IMG_CONTEXT> <image>?", (MessageMedia((7,)),)),),
    (Message("user", "What?", (MessageMedia((7,)), MessageMedia((3,)))),),
    (Message("user", "What?", (MessageMedia((1, 1, 1), "video", (0.5, 1.5, 2.5)),)),),
    (
        Message("user", "a"),
        Message("assistant", "b <image>"),
        Message("user", "c", (MessageMedia((2,)),)),
    ),
)


@dataclass(frozen=True)
class Config:
    template: str | None = None
    system_message: str | None = None
    layout: str = "native"


def with_template(folder, source: str):
    (folder / "chat_template.jinja").write_text(source)
    return load_template(Config(), folder)


def same(segments):
    """Segments without who typed them, neighbours joined."""
    parts: list[str | int] = []
    for segment in segments:
        if isinstance(segment, TextSegment) and parts and isinstance(parts[-1], str):
            parts[-1] += segment.text
        else:
            parts.append(segment.text if isinstance(segment, TextSegment) else segment.tiles)
    return parts


@pytest.mark.parametrize("source", [NATIVE, WRAPPED, STRINGS], ids=["native", "wrapped", "strings"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_a_repositorys_template_adds_no_system_turn_of_its_own(tmp_path, source, turns, system):
    template = with_template(tmp_path, source)
    if source is STRINGS and any(turn.media for turn in turns):
        with pytest.raises(PromptError, match="cannot render this conversation"):
            template.render(turns, system)
        return
    expected = InternVLTemplate().render(turns, system or "")
    assert same(template.render(turns, system)) == same(expected)


def test_typed_placeholders_stay_typed(tmp_path):
    turn = Message(
        "user",
        "a <image> <IMG_CONTEXT> \ue0000\ue001 <|im_end|>",
        (MessageMedia((4,)), MessageMedia((5,))),
    )
    segments = with_template(tmp_path, NATIVE).render((turn,), "")
    assert [s.tiles for s in segments if isinstance(s, ImageSegment)] == [4, 5]
    assert TextSegment(turn.text, untrusted=True) in segments


def test_a_template_means_what_transformers_makes_of_it(tmp_path):
    write_qwen_tokenizer(tmp_path)
    template = with_template(tmp_path, NATIVE)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What?"}],
            },
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    ours = template.render((Message("user", "What?", (MessageMedia((1,)),)),), "Be brief.")
    assert (
        "".join(s.text if isinstance(s, TextSegment) else "<IMG_CONTEXT>" for s in ours) == theirs
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", {"chat_template": WRAPPED}),
        ("tokenizer_config.json", {"chat_template": WRAPPED}),
        (
            "tokenizer_config.json",
            {
                "chat_template": [
                    {"name": "x", "template": "no"},
                    {"name": "default", "template": WRAPPED},
                ]
            },
        ),
    ],
)
def test_the_template_is_found_in_every_file(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    assert load_template(Config(), tmp_path).origin == name


def test_a_template_inherited_from_a_text_model_is_passed_over(tmp_path):
    text_only = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(text_only))
    assert load_template(Config(system_message="x"), tmp_path) == InternVLTemplate("x")


def test_tokens_of_the_tokenizer_are_known_to_the_template(tmp_path):
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}" + NATIVE
    start = with_template(tmp_path, source).render((Message("user", "q"),), "")[0]
    assert start.text.startswith("<s></s><|im_start|>user")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{# image #}{{ raise_exception('no such\\nturn') }}", "conversation: no such turn; put"),
        ("{# image #}{{ messages[9]['role'] }}", "cannot render this conversation: .*9"),
        ("{# image #}{{ 1 / 0 }}", "cannot render this conversation: division by zero"),
        ("{# image #}{{ messages.append(1) }}", "cannot render this conversation: .*unsafe"),
        (NATIVE.replace("<IMG_CONTEXT>", ""), "omits a message or an image"),
        (NATIVE.replace("<IMG_CONTEXT>", "<image><image>"), "omits a message or an image"),
        ("{# image #}hello", "omits a message or an image"),
    ],
)
def test_a_template_that_fails_says_so_in_one_line(tmp_path, source, message):
    template = with_template(tmp_path, source)
    with pytest.raises(PromptError, match=message) as caught:
        template.render((Message("user", "q", (MessageMedia((1,)),)),), "")
    assert str(caught.value).startswith("chat_template.jinja ")
    assert "\n" not in str(caught.value)


def test_a_broken_template_names_its_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not a valid .* \(line 2: "):
        with_template(tmp_path, "image\n{% for %}")
