"""The benchmarks as data: prompt, tiles, tokens, metric and parser of each, in three harnesses.

``internvl`` is how the published tables were measured: InternVL's own scripts, and VLMEvalKit where
those have no script. ``vlmevalkit`` is VLMEvalKit's class for InternVL throughout. ``lmms`` is
lmms-eval's model ``internvl3``. The same model gets 50.7 on MMMU in one and 54.8 in another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.item_fields import QUESTION_KEYS
from internvl3_mlx.evaluation.item_files import Layout
from internvl3_mlx.files import did_you_mean

PRESETS = ("internvl", "vlmevalkit", "lmms")
HARNESSES = {
    "internvl": "InternVL's scripts",
    "vlmevalkit": "VLMEvalKit's InternVL class",
    "lmms": "lmms-eval's internvl3",
}
OWN_TASK = "own"  # data of one's own
SYNTHETIC_TASK = "synthetic"

# in a prompt {hint} ends with a newline and {options} begins with one, if there are any
WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CHINESE_LETTER = "请直接回答选项字母。"
PLAIN = "{question}"
VQA = "{question} " + WORD
VQA_LINE = "{question}\n" + WORD
CHOICE = "{hint}{question}{options}\n" + LETTER
DIRECT = "{question}\nAnswer the question directly."
YES_NO = "{question} Please answer yes or no. " + WORD
REGION = (
    "Please provide the bounding box coordinate of the region this sentence describes: "
    "<ref>{question}</ref>"
)
VIDEO_CHOICE = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n\n"
    "Question: {question}\nOptions:{options_in_brackets}\nOnly give the best option."
)
COT_TOKENS = 4096  # room for reasoning, as in both harnesses
CLICK = "Where should I click to do the following? {question} Answer with a point [x, y]."


@dataclass(frozen=True)
class TaskSettings:
    """How one harness asks and scores.

    prompt: with ``{question}``, ``{capitalized}``, ``{hint}``, ``{options}``. open_prompt: for
    questions without options. max_tiles: of one image, None for the model's own. shared_tiles: of
    all images of a question together. metric, parser: names in ``scoring``. judge: a language
    model reads answers that the parser cannot. joined: all images form one run of tokens, and only
    the first has several tiles. upscale: factor by which the first image is enlarged. drop: text
    that is removed from questions. circular: every rotation of the options is asked. cot: the
    question is asked in the published reasoning prompt.
    """

    prompt: str
    max_tiles: int | None
    max_tokens: int
    metric: str
    parser: str = "text"
    open_prompt: str | None = None
    judge: bool = False
    num_frames: int = 16
    shared_tiles: int | None = None
    placement: str = "numbered"
    frame_label: str = "Frame{}: "
    joined: bool = False
    upscale: int = 1
    drop: str = ""
    circular: bool = False
    cot: bool = False


@dataclass(frozen=True)
class Task:
    """A benchmark. tsv: VLMEvalKit's files. hub: the data set that lmms-eval reads.

    own: no harness knows it: a file of the user's, or rendered sets.
    """

    name: str
    title: str
    settings: Mapping[str, TaskSettings]
    tsv: tuple[str, ...] = ()
    hub: str = ""
    layout: Layout = field(default_factory=Layout)
    own: bool = False

    def harness(self, preset: str) -> str | None:
        """Return whose settings a preset gives; None for a task that no harness has."""
        return None if self.own else HARNESSES[preset]

    def settings_of(self, preset: str) -> TaskSettings:
        """Return a preset's settings; raise UserError for an unknown preset."""
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; {did_you_mean(preset, PRESETS)}")
        return self.settings[preset]


def presets(
    internvl: TaskSettings, vlmevalkit: TaskSettings | None = None, lmms: TaskSettings | None = None
) -> Mapping[str, TaskSettings]:
    """Complete three presets with what the harnesses do in every task.

    VLMEvalKit and lmms-eval share 64 tiles among the images of a question and write up to 4096 and
    1024 tokens; lmms-eval has 12 tiles in every task.
    """
    kit = vlmevalkit or internvl
    other = lmms or replace(kit, max_tokens=1024)
    return MappingProxyType({
        "internvl": internvl,
        "vlmevalkit": replace(
            kit, max_tokens=4096, shared_tiles=64, frame_label="Frame-{}: ", joined=False
        ),
        "lmms": replace(
            other, max_tiles=12, shared_tiles=64, placement="spaced", upscale=1, joined=False,
            judge=False, circular=False,
        ),
    })  # fmt: skip


def vqa_task(
    name: str, title: str, tiles: tuple[int, int], tokens: tuple[int, int], metric: str,
    lmms_prompt: str = VQA_LINE, **more: Any,
) -> Task:  # fmt: skip
    """A question with a short answer. tiles: InternVL, VLMEvalKit. tokens: InternVL, lmms-eval."""
    own = TaskSettings(VQA, tiles[0], tokens[0], metric)
    # InternVL's ChartQA script measures the 5% by the model's own number
    own = replace(own, metric="relaxed_by_prediction") if metric == "relaxed" else own
    kit = TaskSettings(VQA_LINE, tiles[1], 4096, metric)
    lmms = replace(kit, prompt=lmms_prompt, max_tokens=tokens[1])
    return Task(name, title, presets(own, kit, lmms), **more)


def choice_task(
    name: str, title: str, internvl: TaskSettings | None = None, lmms: TaskSettings | None = None,
    **more: Any,
) -> Task:  # fmt: skip
    """A multiple-choice task that VLMEvalKit defines; unclear answers go to a judge there."""
    kit = TaskSettings(CHOICE, 6, 4096, "letter", "rules", open_prompt=DIRECT, judge=True)
    return Task(name, title, presets(internvl or kit, kit, lmms), **more)


OCRBENCH = TaskSettings(VQA_LINE, 24, 4096, "ocrbench")
MATHVISTA = TaskSettings(PLAIN, 6, 4096, "mathvista", "stated", judge=True)
HALLUSION = TaskSettings(YES_NO, 6, 4096, "hallusion", "yes_or_no", judge=True)
MME = TaskSettings(VQA, 6, 20, "mme", "yes_or_no_prefix")
POPE = TaskSettings(VQA, 6, 100, "pope", "yes_unless_denied", drop="\n" + WORD)
REFCOCO = TaskSettings(REGION, 6, 100, "iou")
MMMU = TaskSettings(
    CHOICE, 6, 10, "mmmu", "first_character", open_prompt=VQA_LINE, joined=True, upscale=2
)
SHORT_CHOICE = TaskSettings(CHOICE, 12, 16, "letter", "leading_letter")
VIDEO = TaskSettings(VIDEO_CHOICE, 1, 1000, "letter", "bracketed_letter")
VIDEO_LETTER = TaskSettings(CHOICE, 1, 4096, "letter", "rules", judge=True)

TASKS: Mapping[str, Task] = MappingProxyType({
    task.name: task
    for task in (
        Task(
            "mmmu", "MMMU",
            presets(
                MMMU,
                replace(
                    MMMU, max_tiles=12, parser="rules", judge=True, open_prompt=DIRECT
                ),
                TaskSettings(
                    "{question}{options}\n\n" + LETTER, 12, 128, "mmmu", "authors",
                    open_prompt="{question}\n\n" + WORD,
                ),
            ),
            tsv=("MMMU_DEV_VAL",), hub="lmms-lab/MMMU",
        ),
        Task(
            "mathvista", "MathVista", presets(MATHVISTA, None, replace(MATHVISTA, judge=False)),
            tsv=("MathVista_MINI",), hub="AI4Math/MathVista",
            layout=Layout(question_keys=("query", *QUESTION_KEYS)),
        ),
        choice_task(
            "ai2d", "AI2D", TaskSettings(CHOICE, 6, 10, "letter", "text"), SHORT_CHOICE,
            tsv=("AI2D_TEST",), hub="lmms-lab/ai2d", layout=Layout(by_index=True),
        ),
        vqa_task(
            "chartqa", "ChartQA", (12, 12), (100, 16), "relaxed",
            "{question}\nAnswer the question with a single word.",
            tsv=("ChartQA_TEST",), hub="lmms-lab/ChartQA",
        ),
        vqa_task(
            "docvqa", "DocVQA", (18, 18), (100, 32), "anls",
            tsv=("DocVQA_VAL",), hub="lmms-lab/DocVQA/DocVQA",
        ),
        vqa_task(
            "infovqa", "InfoVQA", (24, 24), (100, 32), "anls",
            tsv=("InfoVQA_VAL",), hub="lmms-lab/DocVQA/InfographicVQA",
        ),
        vqa_task(
            "textvqa", "TextVQA", (6, 6), (10, 1024), "vqa", "{capitalized}\n" + WORD,
            tsv=("TextVQA_VAL",), hub="lmms-lab/textvqa",
        ),
        Task(
            "ocrbench", "OCRBench",
            presets(
                OCRBENCH, None,
                TaskSettings(PLAIN, 12, 128, "ocrbench_folded"),
            ),
            tsv=("OCRBench",), hub="echo840/OCRBench",
        ),
        Task(
            "mmbench", "MMBench",
            presets(
                TaskSettings(CHOICE, 6, 100, "circular", "rules", judge=True, circular=True),
                None,
                TaskSettings(CHOICE, 12, 1024, "letter", "rules"),
            ),
            tsv=("MMBench_DEV_EN", "MMBench_DEV_EN_V11"), hub="lmms-lab/MMBench",
        ),
        Task(
            "mme", "MME",
            presets(
                MME, None,
                replace(
                    MME, prompt=VQA_LINE, max_tokens=16, drop=" Please answer yes or no."
                ),
            ),
            tsv=("MME",), hub="lmms-lab/MME",
            layout=Layout(group_keys=("image_path", "question_id")),
        ),
        Task(
            "pope", "POPE",
            presets(
                POPE,
                TaskSettings(PLAIN, 6, 4096, "pope", "yes_or_no"),
                replace(POPE, prompt=VQA_LINE, max_tokens=128, parser="lower"),
            ),
            tsv=("POPE",), hub="lmms-lab/POPE",
        ),
        Task(
            "refcoco", "RefCOCO",
            presets(
                REFCOCO, None,
                replace(
                    REFCOCO, max_tokens=1024,
                    prompt="Bounding box coordinates are specified in the format (top-left x, "
                    "top-left y, bottom-right x, bottom-right y). All values are floating point "
                    "numbers bounded between 0 and 1. Please provide the bounding box coordinate "
                    "of the region this sentence describes: {question}",
                ),
            ),
            hub="lmms-lab/RefCOCO",
            layout=Layout(question_keys=("sent", "answer", *QUESTION_KEYS), boxes=True),
        ),
        choice_task(
            "mmstar", "MMStar",
            lmms=TaskSettings(CHOICE.removesuffix("."), 12, 1024, "letter", "rules"),
            tsv=("MMStar",), hub="Lin-Chen/MMStar",
        ),
        Task(
            "hallusionbench", "HallusionBench",
            presets(
                HALLUSION, None,
                replace(HALLUSION, prompt=PLAIN, max_tokens=128),
            ),
            tsv=("HallusionBench",), hub="lmms-lab/HallusionBench",
        ),
        choice_task(
            "realworldqa", "RealWorldQA",
            lmms=TaskSettings(PLAIN, 12, 16, "letter", "rules"),
            tsv=("RealWorldQA",), hub="lmms-lab/RealWorldQA",
        ),
        choice_task(
            "scienceqa", "ScienceQA",
            TaskSettings(CHOICE, 6, 100, "letter", "text"),
            replace(SHORT_CHOICE, prompt="{context}{question}{options}\n" + LETTER),
            tsv=("ScienceQA_TEST",), hub="lmms-lab/ScienceQA", layout=Layout(by_index=True),
        ),
        Task(
            "mvbench", "MVBench",
            presets(
                VIDEO, None,
                replace(VIDEO_LETTER, max_tokens=16, parser="rules", judge=False),
            ),
            tsv=("MVBench",), hub="OpenGVLab/MVBench",
        ),
        Task(
            "videomme", "Video-MME",
            presets(VIDEO_LETTER, None, replace(VIDEO_LETTER, max_tokens=16)),
            tsv=("Video-MME",), hub="lmms-lab/Video-MME",
        ),
        Task(
            "screenspot", "ScreenSpot", presets(TaskSettings(CLICK, 12, 100, "point")),
            hub="rootsautomation/ScreenSpot",
            layout=Layout(question_keys=("instruction", *QUESTION_KEYS), boxes=True),
        ),
    )
})  # fmt: skip


def own_task(metric: str, prompt: str | None, title: str, *, boxes: bool = False) -> Task:
    """Return a task for data of one's own: the model's own tiles, and questions as they are.

    Questions with options are followed by them, and by the request for a letter.
    """
    letters = metric == "letter"
    settings = TaskSettings(
        prompt or (CHOICE if letters else PLAIN),
        None,
        1024,
        metric,
        "rules" if letters else "text",
        open_prompt=prompt or PLAIN,
        num_frames=8,
    )
    layout = Layout(boxes=boxes)
    return Task(OWN_TASK, title, dict.fromkeys(PRESETS, settings), layout=layout, own=True)


def synthetic_task(prompt: str | None) -> Task:
    """Return the task of the rendered sets: the model's own tiles, the prompt of short answers."""
    settings = TaskSettings(prompt or VQA_LINE, None, 64, "rendered", "final")
    return Task(SYNTHETIC_TASK, "rendered sets", dict.fromkeys(PRESETS, settings), own=True)


def with_reasoning(how: TaskSettings) -> TaskSettings:
    """Ask for reasoning first: room for it, and a parser that reads the answer at its end."""
    parser = {"text": "final", "lower": "final", "first_character": "rules"}.get(
        how.parser, how.parser
    )
    if how.metric == "letter":
        parser = "rules"
    return replace(how, cot=True, parser=parser, max_tokens=max(how.max_tokens, COT_TOKENS))


def find_task(name: str) -> Task:
    """Return a task by name, whatever its case and hyphens; raise UserError for an unknown one."""
    bare = name.lower().replace("-", "").replace("_", "")
    aliases = {alias.lower().replace("-", "").replace("_", ""): task for task in TASKS.values()
               for alias in (task.name, task.title, *task.tsv)}  # fmt: skip
    if bare not in aliases:
        raise UserError(f"no task or file {name!r}; {did_you_mean(name.lower(), TASKS)}")
    return aliases[bare]
