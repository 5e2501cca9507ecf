"""`axolotl mopo generate`, `score` and `front`."""

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from click.core import ParameterSource
from pydantic import ValidationError

FAULTS = (OSError, ValueError, TimeoutError)
"""Errors of files, data and settings, which are shown as a message; any other error shows its traceback."""

T = TypeVar("T")

_FOLDER = click.Path(file_okay=False, path_type=Path)


def _mapping(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, Any] | None:
    """Parse a JSON object; None if the option is not given."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text} is not JSON: {error}; write '{{\"enable_thinking\": false}}'") from None
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text} is not a JSON object; write '{{\"enable_thinking\": false}}'")
    return value


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--prompts", "source", required=True, help="Prompts: a file, a folder or a data set of the hub.")
@click.option("--out", type=_FOLDER, required=True, help="Folder of the comparison.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    help="A run to compare with, with a mark of its own in the plots; may be repeated.",
)
@click.option("--reference", help="The model that the runs were trained from; `none` for no reference.")
@click.option("--field", help="Column of the prompts; by default prompt, messages, question or instruction.")
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of distinct prompts to read.")
@click.option("--split", default="train", show_default=True, help="A split, or a part such as train[:200].")
@click.option("--name", help="Configuration of a data set of the hub.")
@click.option("--data-files", multiple=True, help="A file of the data set; may be repeated.")
@click.option("--revision", help="Revision of a data set of the hub.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Number of responses to each prompt."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Maximum length of a response, reasoning and answer together.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Temperature; 0 is greedy decoding.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens with this total probability.",
)
@click.option(
    "--seed", default=42, show_default=True, help="Random seed, combined with the prompt and the sample's number."
)
@click.option("--dimension", help="AMoPO: use the prompt of this dimension, not the integrated one.")
@click.option("--score", type=float, help="AMoPO: score of the dimension to ask for; by default the best.")
@click.option(
    "--chat-template-kwargs",
    callback=_mapping,
    help="Variables of the chat template for all policies, as JSON: '{\"enable_thinking\": false}'. Default: "
    "those that each policy was trained with, from its mopo.json.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Number of prompts in a batch."
)
@click.option(
    "--dtype", default="auto", show_default=True, help="Data type of the weights: auto, float32, bfloat16 or float16."
)
@click.option(
    "--generation-config",
    type=click.Choice(["neutral", "model"]),
    default="neutral",
    show_default=True,
    help="model: use each model's own generation settings, including its temperature and top-p.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "vllm"]),
    default="auto",
    show_default=True,
    help="auto: vLLM if it is installed, otherwise transformers.",
)
def generate(
    runs: tuple[str, ...],
    source: str,
    out: Path,
    baselines: tuple[str, ...],
    reference: str | None,
    field: str | None,
    limit: int | None,
    dimension: str | None,
    score: float | None,
    chat_template_kwargs: dict[str, Any] | None,
    batch_size: int,
    dtype: str,
    engine: str,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    generation_config: Literal["neutral", "model"],
    **table: Any,
) -> None:
    """Generate responses of every policy in RUNS to the same prompts.

    The reasoning of a response is stored apart from its answer.

    RUNS are folders of sweeps or runs, checkpoints, or models of the hub; NAME=PATH gives a run a name. Adapters with
    the same base model share it. Existing responses are not generated again.
    """
    from axolotl_mopo.evaluation.engines import choose_engine
    from axolotl_mopo.evaluation.generating import Generation
    from axolotl_mopo.evaluation.models import Models
    from axolotl_mopo.evaluation.policies import find_policies, reference_policy
    from axolotl_mopo.evaluation.prompts import read_prompts
    from axolotl_mopo.evaluation.schema import PromptChoice, Sampling

    _refuse_with(generation_config == "model", "--generation-config model", "temperature", "top_p")
    try:
        sampling = _options(
            Sampling,
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            generation_config=generation_config,
        )
        policies = [*find_policies(runs), *find_policies(baselines, "baseline")]
        compared = None if reference == "none" else reference_policy(policies, reference, click.echo)
        prompts = read_prompts(source, field=field, limit=limit, **table)
        models = Models(dtype)
        Generation(
            folder=out,
            prompts=prompts,
            sampling=sampling,
            asking=_options(PromptChoice, dimension=dimension, score=score),
            engine=choose_engine(engine, models, sampling),
            models=models,
            batch_size=batch_size,
            log=click.echo,
            chat_template_kwargs=chat_template_kwargs,
        ).run(policies, compared)
    except FAULTS as error:
        raise click.ClickException(str(error)) from None
    repeated = f" ({prompts.repeated:,} duplicates left out)" if prompts.repeated else ""
    click.echo(
        f"{out} holds {samples} responses to each of {len(prompts.conversations):,} prompts{repeated}.\n"
        f"Next: axolotl mopo score {out} --scorer NAME=SOURCE"
    )


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    required=True,
    help="NAME=SOURCE[:ARGUMENT], or NAME={source: SOURCE, ...} with the keys of a margin in YAML; may be repeated. "
    "Sources: reward_model:PATH, callable:package.module:function, length:words, adapter:PATH.",
)
@click.option(
    "--lower-is-better", "lower", multiple=True, help="An objective for which lower is better, such as a cost."
)
@click.option("--higher-is-better", "higher", multiple=True, help="An objective for which higher is better (default).")
@click.option("--replace", is_flag=True, help="Replace scores that another scorer computed.")
@click.option(
    "--with-reasoning",
    is_flag=True,
    help="Score reasoning and answer, not the answer alone: a reward model reads them as its chat template writes "
    "them, functions and lengths as one text `<think> reasoning </think> answer`. Implicit rewards are always of both.",
)
@click.option(
    "--empty-answers",
    is_flag=True,
    help="Score a response that ended inside its reasoning as an empty answer. Default: such responses are refused.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Number of responses in a batch, for implicit rewards.",
)
@click.option("--dtype", default="auto", show_default=True, help="Data type of the weights, for implicit rewards.")
def score(
    folder: Path,
    scorers: tuple[str, ...],
    lower: tuple[str, ...],
    higher: tuple[str, ...],
    replace: bool,
    with_reasoning: bool,
    empty_answers: bool,
    batch_size: int,
    dtype: str,
) -> None:
    """Score the responses in FOLDER: one column per objective. Existing scores are not computed again."""
    from axolotl_mopo.evaluation.comparison import Comparison
    from axolotl_mopo.evaluation.models import Models
    from axolotl_mopo.evaluation.scoring import Scoring, parse_scorer

    try:
        parsed = [parse_scorer(text) for text in scorers]
        named = [name for name, _ in parsed]
        if len(set(named)) < len(named) or set(lower) & set(higher) or {*lower, *higher} - set(named):
            raise click.UsageError(
                "an objective is named by two --scorer or two directions, or a direction has no --scorer; give every "
                "objective one --scorer and at most one of --lower-is-better and --higher-is-better"
            )
        directions = {**dict.fromkeys(lower, True), **dict.fromkeys(higher, False)}
        with Comparison.existing(folder) as comparison:
            scoring = Scoring(comparison, Models(dtype), batch_size, click.echo, with_reasoning, empty_answers)
            scoring.run(dict(parsed), directions, replace)
    except FAULTS as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Scored {', '.join(named)}. Next: axolotl mopo front {folder}")


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--objectives", help="Compare by these objectives only: a,b,c.")
@click.option("--reference-point", help="Reference point of the hypervolumes: a=0,b=-5; by default the worst means.")
@click.option(
    "--shown-prompts",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Number of prompts whose responses the page shows.",
)
def front(folder: Path, objectives: str | None, reference_point: str | None, shown_prompts: int) -> None:
    """Compare the policies in FOLDER and find the Pareto front.

    Prints a table and writes front.csv, front.json, front.png, front.svg and front.html into FOLDER.
    """
    from rich.console import Console

    from axolotl_mopo.evaluation.comparison import Comparison
    from axolotl_mopo.evaluation.page import render
    from axolotl_mopo.evaluation.plots import draw
    from axolotl_mopo.evaluation.report import notes, table, to_csv, to_json
    from axolotl_mopo.evaluation.statistics import find_front

    try:
        with Comparison.existing(folder) as comparison:
            found = find_front(comparison, _objectives(objectives), _point(reference_point))
            outputs = {
                "front.csv": to_csv(found).encode(),
                "front.json": to_json(found).encode(),
                "front.html": render(found, comparison, shown_prompts).encode(),
                **{f"front.{kind}": draw(found, kind) for kind in ("png", "svg")},
            }
            comparison.write_outputs(outputs)
    except FAULTS as error:
        raise click.ClickException(str(error)) from None
    Console().print(table(found))
    click.echo("\n".join(notes(found)))
    click.echo(f"Wrote front.html, front.png, front.svg, front.csv and front.json to {folder}.")


def _options(kind: type[T], **options: Any) -> T:
    """Validate options as a record.

    Raises:
        click.UsageError: if an option is wrong; names the first one.
    """
    from axolotl_mopo.records import explain

    try:
        return kind(**options)
    except ValidationError as error:
        raise click.UsageError(f"the options{explain(error)}") from None


def _objectives(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise click.BadParameter(f"--objectives {text}: a name is empty or repeated; write a,b,c, every name once")
    return names


def _point(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        pairs = [(name.strip(), float(value)) for name, value in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise click.BadParameter(f"--reference-point {text}: not a list of NAME=NUMBER; write a=0,b=-5") from None
    if len(dict(pairs)) < len(pairs):
        raise click.BadParameter(f"--reference-point {text}: an objective is named twice; name every objective once")
    return dict(pairs)


def _refuse_with(option_given: bool, option: str, *others: str) -> None:
    """Refuse options that have no effect together with another one."""
    context = click.get_current_context()
    for other in others:
        if option_given and context.get_parameter_source(other) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{other.replace('_', '-')} has no effect with {option}; remove one of the two")
