"""From a task and some options to an ``Evaluation`` that is ready to run."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.nn as nn

from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.eval_settings import EvalSettings
from internvl3_mlx.evaluation.item_files import SUFFIXES, FileItems, open_items
from internvl3_mlx.evaluation.items import ItemSource, SelectedItems, rotate_all, select_items
from internvl3_mlx.evaluation.judge import NOBODY, SELF, Judge, TextJudge, load_text_judge
from internvl3_mlx.evaluation.runner import AnswerBatch, Evaluation, Question
from internvl3_mlx.evaluation.scoring import BOX_METRICS, OWN_METRICS
from internvl3_mlx.evaluation.tasks import (
    OWN_TASK,
    TASKS,
    Task,
    TaskSettings,
    find_task,
    own_task,
    synthetic_task,
    with_reasoning,
)
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.records.hub_datasets import DATASET_NAME
from internvl3_mlx.test_time_scaling.best_of import (
    BestOfConfig,
    BestOfQuestion,
    BestOfResult,
    best_of_events,
)
from internvl3_mlx.test_time_scaling.candidates import BEST_OF_DEFAULTS
from internvl3_mlx.test_time_scaling.critic import Critic
from internvl3_mlx.vlm import VLM

LMU_VARIABLE, LMU_FOLDER = "LMUData", "~/LMUData"  # where VLMEvalKit keeps its files
SAMPLING = ("temperature", "top_p", "seed")  # of candidates; tokens are the task's
RESULTS_FOLDER = "evaluations"
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate on, and what differs from the preset.

    task: a benchmark, or a file of one's own. data: a file, a folder, or a data set on the Hub; by
    default VLMEvalKit's file in $LMUData. limit: evaluate this many items, by the share of each
    category. metric, prompt, max_tiles, max_tokens, num_frames: instead of the preset's. cot: ask
    for reasoning first.
    """

    task: str
    data: str | None = None
    split: str | None = None
    preset: str = "internvl"
    limit: int | None = None
    seed: int = 0
    metric: str | None = None
    prompt: str | None = None
    max_tiles: int | None = None
    max_tokens: int | None = None
    num_frames: int | None = None
    cot: bool = False


@dataclass(frozen=True, eq=False)
class EvalPlan:
    """A task with its items, before a model is loaded. changed: what differs from the preset."""

    options: EvalOptions
    task: Task
    how: TaskSettings
    items: SelectedItems
    changed: tuple[str, ...]


def plan_evaluation(options: EvalOptions) -> EvalPlan:
    """Find the task and open its data; raises ``UserError`` or ``DataError`` for mistakes."""
    task, data = resolve_task(options)
    how = task.settings_of(options.preset)
    changes = {
        name: value
        for name in ("metric", "prompt", "max_tiles", "max_tokens", "num_frames")
        if (value := getattr(options, name)) is not None
    }
    how = changed_settings(with_reasoning(how) if options.cot else how, changes)
    source = open_items(data, task.layout, options.split)
    items = select_items(rotated(source, how), options.limit, options.seed)
    own = task.name == OWN_TASK
    return EvalPlan(options, task, how, items, () if own else changed_names(changes, options.cot))


def changed_names(changes: Mapping[str, Any], cot: bool) -> tuple[str, ...]:
    return tuple(sorted((*changes, *(("cot",) if cot else ()))))


def plan_synthetic(options: EvalOptions, source: ItemSource) -> EvalPlan:
    """Plan an evaluation on rendered sets."""
    task = synthetic_task(options.prompt)
    changes = {
        name: value
        for name in ("max_tiles", "max_tokens")
        if (value := getattr(options, name)) is not None
    }
    how = replace(task.settings_of(options.preset), **changes)
    return EvalPlan(options, task, how, select_items(source, None, 0), tuple(sorted(changes)))


def changed_settings(how: TaskSettings, changes: Mapping[str, Any]) -> TaskSettings:
    """Change some settings; a prompt of one's own is also asked where there are no options."""
    metric = changes.get("metric")
    if metric is not None and metric not in OWN_METRICS:
        raise UserError(f"unknown metric {metric!r}; {did_you_mean(metric, OWN_METRICS)}")
    changed = replace(how, **changes)
    if "prompt" in changes:
        changed = replace(changed, open_prompt=changes["prompt"])
    if metric == "letter":
        changed = replace(changed, parser="rules")
    elif metric is not None:
        changed = replace(changed, parser="text")
    return changed


def rotated(source: FileItems, how: TaskSettings) -> ItemSource:
    return rotate_all(source, source.option_counts) if how.circular else source


def resolve_task(options: EvalOptions) -> tuple[Task, str]:
    """Return the task and where its data are; a file in place of a task is data of one's own."""
    path = Path(options.task).expanduser()
    is_file = options.task not in TASKS and (path.suffix.lower() in SUFFIXES or path.exists())
    if is_file or (DATASET_NAME.fullmatch(options.task) and options.data is None):
        if options.data is not None:
            raise UserError(f"{options.task} is a file, and --data names another; give one of them")
        return own_data_task(options, options.task), options.task
    task = find_task(options.task)
    return task, options.data or installed_data(task)


def own_data_task(options: EvalOptions, data: str) -> Task:
    """Return the task of a user's own file: letters where it has options, else exact match."""
    boxes = options.metric in BOX_METRICS
    metric = options.metric
    if metric is None:
        source = open_items(data, own_task("exact", None, data).layout, options.split)
        metric = "letter" if source.has_options else "exact"
    if metric not in OWN_METRICS:
        raise UserError(f"unknown metric {metric!r}; {did_you_mean(metric, OWN_METRICS)}")
    return own_task(metric, options.prompt, Path(data).name, boxes=boxes)


def installed_data(task: Task) -> str:
    """Return VLMEvalKit's file of a task in $LMUData; raises ``UserError`` without one."""
    folder = Path(os.environ.get(LMU_VARIABLE) or LMU_FOLDER).expanduser()
    for name in task.tsv:
        if (folder / f"{name}.tsv").is_file():
            return str(folder / f"{name}.tsv")
    files = " or ".join(f"{name}.tsv" for name in task.tsv)
    ways = [f"VLMEvalKit's {files}" if files else "", f"{task.hub} on the Hub" if task.hub else ""]
    raise UserError(
        f"no data for {task.title}: pass --data with {', or '.join(filter(None, ways))}, or a file "
        "with question, answer and image"
    )


def make_settings(
    plan: EvalPlan,
    vlm: VLM,
    *,
    adapter: str | None = None,
    judge: str | None = None,
    best_of: Mapping[str, object] | None = None,
) -> EvalSettings:
    """Write down everything that decides the predictions."""
    return EvalSettings(
        task=plan.task.name,
        preset=plan.options.preset,
        title=plan.task.title,
        harness=plan.task.harness(plan.options.preset),
        how=plan.how,
        model=vlm.name,
        fingerprint=model_fingerprint(vlm.model),
        data={**plan.items.description, "split": plan.options.split},
        limit=plan.options.limit,
        seed=plan.options.seed,
        judge=judge,
        adapter=adapter,
        weights=describe_weights(vlm),
        best_of=best_of,
        changed=plan.changed,
    )


def describe_weights(vlm: VLM) -> str:
    """Say how the language model's weights are stored: "4 bits", "4 and 8 bits", or a type."""
    modules = vlm.model.language_model.modules()
    bits = sorted({module.bits for module in modules if isinstance(module, QUANTIZED)})
    if bits:
        return " and ".join(map(str, bits)) + " bits"
    return str(vlm.model.language_model.model.embed_tokens.weight.dtype).rpartition(".")[2]


def default_folder(plan: EvalPlan, model: str, adapter: str | None, weights: str) -> Path:
    """Return a folder such as ``evaluations/chartqa-2b-4-bits-internvl``."""
    name = Path(plan.task.title).stem if plan.task.name == OWN_TASK else plan.task.name
    parts = [name, Path(model).name, weights, Path(adapter).name if adapter else ""]
    preset = "" if plan.task.own else plan.options.preset
    words = "-".join(filter(None, [*parts, preset]))
    return Path(RESULTS_FOLDER, re.sub(r"[^\w.-]+", "-", words).lower())


def open_judge(name: str | None, vlm: VLM, how: TaskSettings) -> Judge | None:
    """Return the judge of a task that has one: mlx-lm's model by name, or the model under test."""
    if not how.judge or name == NOBODY:
        return None
    if name in (None, SELF):
        return TextJudge(f"{vlm.name} (the model under test)", lambda prompt: ask_text(vlm, prompt))
    return load_text_judge(str(name))


def ask_text(vlm: VLM, prompt: str) -> str:
    return vlm.ask(prompt, max_tokens=64).text


def make_evaluation(
    plan: EvalPlan,
    vlm: VLM,
    *,
    folder: Path | None = None,
    adapter: str | None = None,
    judge: str | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    best_of: BestOfConfig | None = None,
    critic: Critic | None = None,
) -> Evaluation:
    """Return the evaluation of a loaded model; ``run()`` yields its events.

    best_of: answer with the best of several candidates, chosen by ``critic`` or by vote.
    """
    reader = open_judge(judge, vlm, plan.how)
    name = None if reader is None else reader.name
    chosen = None if best_of is None else describe_best_of(best_of, critic)
    settings = make_settings(plan, vlm, adapter=adapter, judge=name, best_of=chosen)
    place = folder or default_folder(plan, vlm.name, adapter, settings.weights)
    return Evaluation(
        vlm.runner,
        plan.items,
        settings,
        place,
        batch_size=batch_size,
        judge=reader,
        answer_batch=None if best_of is None else best_answers(vlm.runner, best_of, critic),
        overwrite=overwrite,
    )


def describe_best_of(config: BestOfConfig, critic: Critic | None) -> dict[str, object]:
    """Say how many candidates there are, how they are sampled and how the best is chosen."""
    name = None if critic is None else critic.runner.name
    mode = None if critic is None else config.critic_mode
    sampling = {key: BEST_OF_DEFAULTS[key] for key in SAMPLING}
    return {"n": config.n, "method": config.method, "critic": name, "mode": mode, **sampling}


def best_answers(runner: ModelRunner, config: BestOfConfig, critic: Critic | None) -> AnswerBatch:
    """Return a function that answers each question with the best of its candidates."""

    def answer_all(questions: Sequence[Question]) -> list[Answer]:
        return [best_answer(runner, question, config, critic) for question in questions]

    return answer_all


def best_answer(
    runner: ModelRunner, question: Question, config: BestOfConfig, critic: Critic | None
) -> Answer:
    sampling = {key: BEST_OF_DEFAULTS[key] for key in SAMPLING}
    asked = BestOfQuestion(
        question.text, question.images, replace(question.config, **cast(Any, sampling))
    )
    *_, last = best_of_events(asked, config, runner, critic, inputs=question.inputs)
    assert isinstance(last, BestOfResult)
    return last.answer
