"""A thought is split from its answer, kept out of the history, and closed by its budget."""

from itertools import product

import pytest
from fixtures.inputs import random_image

from internvl3_mlx import UserError
from internvl3_mlx.cli.generation_fields import make_config
from internvl3_mlx.generation import generate, parallel_samples
from internvl3_mlx.generation import thinking as thinking_module
from internvl3_mlx.generation.batch_generate import batch_generate
from internvl3_mlx.generation.generation_config import GenerationConfig, with_overrides
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.thinking import Part, ThoughtBudget, ThoughtSplitter
from internvl3_mlx.prompt.messages import DEFAULT_SYSTEM
from internvl3_mlx.prompt.reasoning import R1_SYSTEM_PROMPT

CAT = random_image(130, 70)
WHOLE = " \n<think>\nOne < two,\n\nso </ thin k>.\n</think>\n\nThe answer <think> is 2.</think> "


def split(pieces):
    splitter = ThoughtSplitter()
    found = [*map(splitter.add, pieces), splitter.finish()]
    return "".join(a for a, _ in found), "".join(b for _, b in found)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 200])
def test_tags_are_found_however_the_text_is_cut(size):
    pieces = [WHOLE[at : at + size] for at in range(0, len(WHOLE), size)]
    assert split(pieces) == (
        "One < two,\n\nso </ thin k>.",
        "\n\nThe answer <think> is 2.</think> ",
    )


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>never closed </thi", "never closed </thi", ""),
        ("<thin", "", "<thin"),
        ("no thought</think>", "", "no thought</think>"),
        ("<think></think>yes", "", "yes"),
        ("<think> \n </think>", "", ""),
        ("", "", ""),
        ("思 <think>", "", "思 <think>"),
        ("<think>先看图。</think>猫", "先看图。", "猫"),
    ],
)
def test_what_is_no_whole_thought(text, thought, answer):
    for pieces in ([text], [*text]):
        assert split(pieces) == (thought, answer)


class Letters:
    def add_token(self, token_id):
        return chr(token_id)

    def finalize(self):
        return ""


def test_stop_strings_apply_to_the_answer_alone():
    text = "<think>a STOP b</think> yes STOP no"
    stream = TextStream(Letters(), (), ("STOP",), thought=ThoughtSplitter())
    shown = "".join(piece for _, piece in stream.decode(map(ord, text))) + stream.flush()
    assert (stream.reasoning, shown, stream.finish_reason) == ("a STOP b", "yes", "stop")


def test_a_budget_closes_a_thought_once():
    budget = ThoughtBudget(3, (7, 8, 9))
    parts = [Part.START, *[Part.THOUGHT] * 5, *[Part.ANSWER] * 2]
    assert [budget.next_token(part) for part in parts] == [None] * 3 + [7, 8, 9, None, None]
    short = ThoughtBudget(3, (7,))
    assert {short.next_token(p) for p in (Part.THOUGHT, Part.THOUGHT, Part.ANSWER)} == {None}


@pytest.fixture
def opened(vlm, monkeypatch):
    """Answers begin with <think>: the tag is what the first tokens of any answer decode to."""

    class Opened(ThoughtSplitter):
        def __init__(self):
            super().__init__(Part.THOUGHT)

    monkeypatch.setattr(generate, "ThoughtSplitter", Opened)


def test_the_system_prompt_is_the_published_one_and_ones_own_follows(vlm):
    decode = vlm.tokenizer.decode
    plain = decode(vlm.prepare_inputs("Hi").token_ids)
    thinking = decode(vlm.prepare_inputs("Hi", think=True).token_ids)
    both = decode(vlm.prepare_inputs("Hi", think=True, system="Be brief.").token_ids)
    assert thinking == plain.replace(DEFAULT_SYSTEM, R1_SYSTEM_PROMPT)
    assert both == plain.replace(DEFAULT_SYSTEM, f"{R1_SYSTEM_PROMPT}\n\nBe brief.")
    assert "within <think> and </think> tags" in R1_SYSTEM_PROMPT


def test_cot_wraps_the_question_after_its_images(vlm):
    decode = vlm.tokenizer.decode
    plain = decode(vlm.prepare_inputs("How many?", [CAT]).token_ids)
    cot = decode(vlm.prepare_inputs("How many?", [CAT], cot=True).token_ids)
    wrapped = (
        "Your task is to answer the question below. Give step by step reasoning before you answer, "
        'and when you\'re ready to answer, please use the format "Final answer: .."\n\n'
        "Question:\n\nHow many?"
    )
    assert cot == plain.replace("How many?", wrapped)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}])
def test_a_used_up_budget_closes_the_thought_and_the_answer_follows(vlm, opened, settings):
    free = vlm.ask("What?", [CAT], think=True, max_tokens=60, **settings)
    assert (free.text, free.finish_reason) == ("", "length")
    answer = vlm.ask("What?", [CAT], think=True, think_budget=6, max_tokens=60, **settings)
    closing = vlm.tokenizer.encode_text("\n</think>\n\n", specials=True)
    assert answer.token_ids[:6] == free.token_ids[:6]
    assert answer.token_ids[6 : 6 + len(closing)] == closing
    assert answer.reasoning == vlm.tokenizer.decode(free.token_ids[:6]).strip()
    rest = vlm.tokenizer.decode(answer.token_ids[6 + len(closing) :])
    assert answer.text == rest.strip()
    assert answer.text


def test_the_model_goes_on_from_the_closed_thought(vlm, opened):
    """After the forced tokens the model answers as it would to a prompt that ends with them."""
    asked = {"think": True, "temperature": 0}
    answer = vlm.ask("What?", [CAT], **asked, think_budget=4, max_tokens=20)
    prompt = vlm.prepare_inputs("What?", [CAT], think=True)
    closed = len(vlm.tokenizer.encode_text("\n</think>\n\n", specials=True)) + 4
    from internvl3_mlx.generation.processor import ModelInputs
    from internvl3_mlx.prompt.v2pe import visual_positions

    ids = [*prompt.token_ids, *answer.token_ids[:closed]]
    positions = visual_positions(ids, vlm.tokenizer.image_id, 1.0)
    again = ModelInputs(ids, prompt.processed_images, positions, prompt.deltas)
    config = vlm.conversation(max_tokens=20 - closed).generation_config
    assert vlm.runner.answer(again, config).token_ids == answer.token_ids[closed:]


def test_several_answers_close_their_thoughts_as_alone(vlm, opened):
    asked = {"think": True, "think_budget": 5, "temperature": 1.0, "max_tokens": 24}
    alone = [vlm.ask("What?", [CAT], seed=seed, **asked) for seed in range(3)]
    found = vlm.ask_many("What?", [CAT], n=3, seed=0, **asked)
    assert [a.token_ids for a in found] == [a.token_ids for a in alone]
    assert [a.reasoning for a in found] == [a.reasoning for a in alone]
    config = vlm.conversation(**asked).generation_config
    assert parallel_samples.can_sample_together(config)


def test_a_thought_is_no_part_of_the_history(vlm, opened):
    asked = {"think": True, "think_budget": 5, "max_tokens": 24, "temperature": 0}
    chat = vlm.conversation(**asked)
    chunks = [*chat.stream("What?", [CAT])]
    answer = chunks[-1].answer
    assert "".join(chunk.reasoning for chunk in chunks) == answer.reasoning != ""
    assert "".join(chunk.text for chunk in chunks) == answer.text == chat.exchanges[0].answer
    assert chat.exchanges[0].token_ids == ()
    follow_up = chat.ask("Why?")
    wanted = vlm.ask("Why?", [CAT], history=chat.history[:2], **asked)
    assert follow_up.token_ids == wanted.token_ids


def test_an_interrupted_thought_leaves_no_trace(vlm, opened):
    chat = vlm.conversation(think=True, max_tokens=24)
    stream = chat.stream("What?", [CAT])
    for _ in range(3):
        next(stream)
    stream.close()
    assert chat.exchanges == []
    assert chat.ask("What?", [CAT]).usage.cached_tokens > 0


def test_json_names_the_reasoning_only_where_it_was_asked_for(vlm, opened):
    thought = vlm.ask("What?", think=True, think_budget=2, max_tokens=16)
    assert thought.to_dict()["reasoning"] == thought.reasoning
    assert "reasoning" not in vlm.ask("What?", max_tokens=2).to_dict()


def test_without_a_tag_all_is_the_answer(vlm):
    plain = vlm.ask("What?", [CAT], max_tokens=8, system=R1_SYSTEM_PROMPT)
    thinking = vlm.ask("What?", [CAT], max_tokens=8, think=True, think_budget=3, temperature=0)
    assert (thinking.text, thinking.reasoning) == (plain.text, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think_budget": 5}, "think_budget is 5, but think is off; set think first"),
        ({"think": True, "cot": True}, "think and cot are mutually exclusive; choose one"),
        ({"think": True, "choice": ["a"]}, "think cannot be combined with choice"),
        (
            {"think": True, "think_budget": 5, "lookup": True},
            "think_budget cannot be combined with speculative decoding",
        ),
        ({"think": True, "think_budget": 0}, "think_budget is 0; choose 1 to"),
    ],
)
def test_contradictions_are_refused(vlm, options, message):
    with pytest.raises(UserError, match=message):
        vlm.ask("What?", **options)


def test_every_split_of_a_short_tag():
    text = "<think>a</think>b"
    for cuts in product([0, 1], repeat=6):
        pieces, last = [], 0
        for at, cut in zip(range(5, 17, 2), cuts, strict=True):
            if cut:
                pieces.append(text[last:at])
                last = at
        assert split([*pieces, text[last:]]) == ("a", "b")


def test_thinking_brings_its_own_defaults_of_sampling():
    plain = GenerationConfig()
    thinking = with_overrides(plain, {"think": True})
    assert (thinking.temperature, thinking.max_tokens) == (0.6, 32_768)
    assert with_overrides(thinking, {"think": False}) == plain
    chosen = with_overrides(plain, {"think": True, "temperature": 0.0, "max_tokens": 5})
    assert (chosen.temperature, chosen.max_tokens) == (0.0, 5)
    kept = with_overrides(with_overrides(plain, {"temperature": 0.3}), {"think": True})
    assert (kept.temperature, kept.max_tokens) == (0.3, 32_768)
    assert with_overrides(kept, {"think": False}).temperature == 0.3
    assert with_overrides(plain, {"think": True, "lookup": True}).temperature == 0
    assert make_config({"think": True}) == thinking


def test_answers_of_a_batch_close_their_thoughts_as_alone(vlm, opened, monkeypatch):
    """The batch forces the tokens that decoding alone forces, greedy and sampled."""
    monkeypatch.setattr(thinking_module, "ThoughtSplitter", generate.ThoughtSplitter)
    images = [CAT, random_image(60, 60), random_image(70, 150)]
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 4}):
        asked = {"think": True, "think_budget": 5, "max_tokens": 24, **sampling}
        alone = [vlm.ask("What?", [image], **asked) for image in images]
        config = vlm.conversation(**asked).generation_config
        inputs = [vlm.prepare_inputs("What?", [image], think=True) for image in images]
        found = [*batch_generate(vlm.runner, inputs, config, 3)]
        assert [a.token_ids for a in found] == [a.token_ids for a in alone]
        assert [a.reasoning for a in found] == [a.reasoning for a in alone]
        assert all(a.text for a in found)
