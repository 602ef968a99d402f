"""`sparse-engine train`: a recipe from data to an executable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparse_engine.cli._common import DebugOption, JsonOption, UsageError, command, console, table


@command(
    "train",
    "train epsd --data digits",
    "train magnitude --data data/cifar10 --set model.name=resnet20 --set train.epochs=60 --out runs/m90",
    "train magnitude --data data/cifar10 --out runs/m90 --resume",
    "train --list",
)
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name (see --list) or a YAML file.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A data folder (MNIST, CIFAR, images by class), or digits.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoint, log, plots, weights and executable; runs/RECIPE by default."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    show_recipes: Annotated[bool, typer.Option("--list", help="List the recipes and stop.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Train a sparse model by a recipe, convert it, and print accuracy, sparsity, speed and size."""
    from sparse_engine.train import keep_freed_memory, load_recipe, parse_setting, recipe_names, run

    if show_recipes:
        recipes = {name: load_recipe(name).description for name in recipe_names()}
        if not as_json:
            listed = table("Recipes", "name", "what")
            for name, description in recipes.items():
                listed.add_row(name, escape(description))
            console().print(listed)
        return {"recipes": recipes}
    if recipe is None:
        raise UsageError(f"name a recipe ({', '.join(recipe_names())}) or a YAML file")
    if data is None:
        raise UsageError("name the data: --data FOLDER, or --data digits to try a recipe at once")
    changes = dict(parse_setting(text) for text in settings or ())
    folder = out or Path("runs") / Path(recipe).stem
    shown = False if as_json else None
    keep_freed_memory()  # this process is for training: the memory of one step serves the next
    try:
        result = run(recipe, data, out=folder, resume=resume, device=device, progress=shown, **changes)
    finally:
        keep_freed_memory(False)
    if not as_json:
        screen = console()
        screen.print(escape(str(result)))
        screen.print(f"Everything is in [bold]{escape(str(folder))}[/bold].")
    return {"out": str(folder), "summary": result.summary}
