"""`dualedit train`: adapters for a model of the user's own (or the embedded one), from their own edits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.recipe import Recipe, read_recipe, recipe_from, recipe_text
from .errors import INTERRUPTED
from .errors import options as named
from .options import path
from .terminal import quiet, shows_progress, use_few_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..data import EditSample

EMBEDDED = "embedded"
# Rendering an edit with its questions takes some hundredths of a second; a thousand are enough to learn from.
EMBEDDED_EDITS = 1000
OUT = Path("adapters")
_OPTION_NAMES = {field.name: "--" + field.name.replace("_", "-") for field in dataclasses.fields(Recipe)}
_OPTION_NAMES["path"] = "--data"
_OPTION_NAMES["image_root"] = "--images"
_ALIASES = {"image_root": ("--image-root",)}  # what an option was called before


@dataclasses.dataclass(frozen=True)
class Options:
    """Options beside the recipe.

    Attributes:
        config: YAML file of a recipe, or None.
        out: folder of the run.
        resume: go on with the run there.
        dry_run: measure some steps instead of training.
        write_configs: folder to write configuration files to instead, or None.
    """

    config: Path | None
    out: Path
    resume: bool
    dry_run: bool
    write_configs: Path | None


def command(config, out, resume, dry_run, write_configs, **given) -> None:
    """Train DualEdit's adapters on your own edits, into a folder that the other commands load.

    Every option can stand in a YAML file (--config; --write-configs writes one with all of them). Defaults
    are the paper's. For several GPUs or machines:
    accelerate launch --config_file ddp.yaml -m dualedit.cli train ...
    """
    options = Options(config, out, resume, dry_run, write_configs)
    flags = {name: value for name, value in given.items() if value is not None}
    if write_configs is not None:
        _write_configs(write_configs)
        return
    with quiet(), named(**_OPTION_NAMES):
        run(recipe_of(options, flags), options)


def _signature(function: Callable[..., None]) -> Callable[..., None]:
    """Give the command an option for every field of `Recipe`."""

    def option(name: str, kind: Any, default: Any, *flags: str, **more: Any) -> inspect.Parameter:
        note = Annotated[kind, typer.Option(*flags, **more)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=note)

    parameters = [
        option("config", Path | None, None, "--config", "-c", parser=path, metavar="FILE",
               help="YAML file with options."),
        option("out", Path, OUT, "--out", "-o", parser=path, metavar="DIR",
               help="Folder for adapters and checkpoints."),
        option("resume", bool, False, "--resume", help="Go on with the run in --out."),
        option("dry_run", bool, False, "--dry-run", help="Only measure what the run will take."),
        option("write_configs", Path | None, None, "--write-configs", parser=path, metavar="DIR",
               help="Only write train.yaml and configurations for accelerate launch (DDP, FSDP, CPU)."),
    ]  # fmt: skip
    for field in dataclasses.fields(Recipe):
        flag = _OPTION_NAMES[field.name]
        shown = "null" if field.default is None else str(field.default).lower()
        about = f"{field.metadata['help']} [{shown}]"
        if isinstance(field.default, bool):
            kind, flags = bool | None, (f"{flag}/--no-{flag[2:]}",)
            parameters.append(option(field.name, kind, None, *flags, help=about, show_default=False))
        else:
            parameters.append(
                option(
                    field.name, str | None, None, flag, *_ALIASES.get(field.name, ()), metavar="X",
                    help=about, show_default=False,
                )  # fmt: skip
            )
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(_signature(command))


def recipe_of(options: Options, flags: dict[str, Any]) -> Recipe:
    """The recipe of a call: defaults, then the file (or the run that goes on), then the options.

    Raises:
        ValueError: an unknown key or a bad value.
    """
    import yaml

    from ..training.loop import RECIPE

    start, named = Recipe(), set()
    saved = options.out / RECIPE
    if options.config is not None:
        start, named = read_recipe(options.config)
    elif options.resume and saved.is_file():
        start, named = read_recipe(saved)
    texts = {field.name for field in dataclasses.fields(Recipe) if field.type in ("str", "str | None")}
    try:
        given = {
            n: yaml.safe_load(v) if isinstance(v, str) and n not in texts else v for n, v in flags.items()
        }
    except yaml.YAMLError as error:
        raise ValueError(f"An option cannot be read: {' '.join(str(error).split())}") from error
    recipe = recipe_from(given, "Options", start)
    if recipe.model is None:
        raise ValueError("--model is missing: pass the folder of a vision-language model, or embedded.")
    if recipe.model == EMBEDDED:
        recipe = _for_embedded(recipe, named | set(given))
    return recipe


def _for_embedded(recipe: Recipe, named: set[str]) -> Recipe:
    """The embedded model has eight narrow layers: the paper's sizes do not fit it."""
    from ..toy.editors import editor_settings

    shipped = editor_settings()["dualedit"]
    fitting = {name: shipped[name] for name in ("text_layer", "vis_layer", "mid_dim")}
    fitting |= {"data": EMBEDDED} if recipe.data is None else {}
    fitting |= {"limit": EMBEDDED_EDITS} if recipe.data in (None, EMBEDDED) else {}
    return dataclasses.replace(recipe, **{n: v for n, v in fitting.items() if n not in named})


def run(recipe: Recipe, options: Options) -> None:
    """Train, or measure what training will take."""
    from ..training import train
    from ..training.dry_run import dry_run, explain_out_of_memory
    from ..training.setup import open_accelerator, set_up

    accelerator = open_accelerator()  # first: it gives each process its GPU
    say = print if accelerator.is_main_process else lambda text: None
    samples, held_out = _edits(recipe, say)
    base, processor = _model(recipe, accelerator)
    say(f"{len(samples)} edits to train on, {len(held_out)} held out.")
    if options.dry_run:
        try:
            setup = set_up(base, processor, samples, held_out, recipe, accelerator)
            measured = dry_run(setup)
        except (RuntimeError, MemoryError) as error:
            told = explain_out_of_memory(error, recipe)
            if told is None:
                raise
            raise ValueError(told) from error
        for note in setup.notes:
            say(f"Note: {note}")
        say(measured.text(recipe))
        return
    outcome = train(
        base, processor, samples, held_out, recipe, options.out, options.resume, shows_progress(), say
    )
    if outcome.stopped:
        say(f"Stopped after step {outcome.step} of {recipe.steps}.")
        say(f"Go on with: dualedit train --out {options.out} --resume")
        raise SystemExit(INTERRUPTED)
    which = (
        "last"
        if outcome.best is None
        else f"best by held-out loss, {outcome.best[1]:.4f} at step {outcome.best[0]}"
    )
    say(f"adapters: {outcome.folder} ({which})")


def _model(recipe: Recipe, accelerator: Any) -> tuple[Any, Any]:
    from .loading import load_base

    if recipe.model == EMBEDDED:
        use_few_threads()
        return load_base(None)
    # FSDP cuts the model up itself, before any of it lies on a GPU.
    return load_base(Path(recipe.model), "cpu")


def _edits(recipe: Recipe, say: Callable[[str], None]) -> tuple[Sequence[EditSample], Sequence[EditSample]]:
    from ..training.data import HELD_OUT_EDITS, load_edits_to_train

    if recipe.data != EMBEDDED:
        return load_edits_to_train(recipe, say)
    from ..toy.samples import edit_samples
    from ..toy.world import World
    from .recipes import recipe as load_recipe

    train_editors = load_recipe("train_editors")
    world = World(0)
    say("Drawing the embedded world's edits ...")
    samples = train_editors.training_samples(world, recipe.limit or EMBEDDED_EDITS, recipe.seed)
    wanted = HELD_OUT_EDITS if recipe.held_out_edits is None else recipe.held_out_edits
    kept, held_out, drawn = train_editors.held_out_entities(world), [], 8
    while len(held_out) < wanted:
        drawn *= 2
        held_out = [s for s in edit_samples(world, "train", drawn, 777 + recipe.seed) if s.entity in kept]
    return samples, held_out[:wanted]


def _write_configs(folder: Path) -> None:
    from importlib.resources import files

    folder.mkdir(parents=True, exist_ok=True)
    texts = {"train.yaml": recipe_text(Recipe())}
    for name in ("ddp.yaml", "fsdp.yaml", "cpu.yaml"):
        texts[name] = files("dualedit.training").joinpath("launch", name).read_text(encoding="utf-8")
    for name in texts:
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists: pass another folder, nothing is written over.")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
