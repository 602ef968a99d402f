"""Recipes: the ones that come along are valid, and every mistake has a clear answer."""

from __future__ import annotations

import pytest

from sparse_engine.errors import RecipeError
from sparse_engine.train.recipe import load_recipe, parse_setting, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert load_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()


def test_the_named_recipes_are_there():
    assert {"epsd", "end_to_end", "data_pruning_kd", "rigl", "magnitude"} <= set(recipe_names())


def test_settings_change_nested_keys():
    recipe = load_recipe(
        "magnitude", dict(map(parse_setting, ["train.learning_rate=5e-3", "prune.ignore=[fc3]", "teacher.epochs=2"]))
    )
    assert recipe.train.learning_rate == 5e-3
    assert recipe.prune.ignore == ["fc3"]
    assert recipe.teacher.epochs == 2


@pytest.mark.parametrize(
    "text, value",
    [
        ("5e-4", 5e-4), ("1e3", 1000.0), ("-0.5", -0.5), (".5", 0.5), ("3", 3), ("0", 0), ("-2", -2), ("2:4", "2:4"),
        ("1:30:00", "1:30:00"), ("true", True), ("null", None), ("[1, 2e-1]", [1, 0.2]), ("1e400", float("inf")),
        ("'3'", "3"), ("digits", "digits"),
    ],
)  # fmt: skip
def test_values_are_read_as_people_write_them(text, value):
    key, found = parse_setting(f"a.b={text}")
    assert key == "a.b"
    assert found == value
    assert type(found) is type(value)


def test_n_of_m_needs_no_quotes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("prune: {structure: 2:4, sparsity: null}\n")
    assert load_recipe(path).prune.structure == "2:4"
    assert load_recipe("magnitude", {"prune.structure": "2:4", "prune.sparsity": None}).prune.structure == "2:4"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntrain: {epochs: 3, learning_rate: 1e-2}\nprune: {sparsity: 0.5, structure: 'block(4, 1)'}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.prune.structure) == (3, 0.01, "block(4, 1)")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.epoch": 3}, "unknown key train.epoch; did you mean train.epochs"),
        ({"trian.epochs": 3}, "unknown key trian; did you mean train"),
        ({"train.epochs": "many"}, "train.epochs is 'many'; expected int"),
        ({"train.epochs": 2.5}, "expected int"),
        ({"train.epochs": -1}, "at least 0"),
        ({"train.nesterov": 1}, "expected bool"),
        ({"train.milestones": [2]}, "shares of training"),
        ({"train.milestones": "0.5"}, "expected list"),
        ({"prune.sparsity": 90}, "fraction, not per cent"),
        ({"prune.sparsity": None}, "prune.sparsity is needed"),
        ({"prune.structure": "bloc(2,2)"}, "bloc"),
        ({"prune.criterion": "magnitud"}, "one of magnitude"),
        ({"loss.name": "kl"}, "one of cross_entropy"),
        ({"loss.name": "kd"}, "needs a teacher"),
        ({"loss.name": "kd", "teacher.epochs": 0}, "epochs > 0 or a checkpoint"),
        ({"dynamic.name": "rigl", "prune": None}, "needs a prune: part"),
        ({"dynamic.name": "rigl", "prune.structure": "2:4", "prune.sparsity": None}, "structure .* cannot move"),
        ({"dynamic.name": "gradual", "dynamic.begin": 0.8}, r"begin=0.8 has to be below dynamic.stop=0.75"),
        ({"prune.options": {"stepz": 1}}, "prune.options of criterion epsd: .*stepz"),
        ({"prune.options": {"mode": "half"}}, "prune.options of criterion epsd: mode is 'half'"),
        ({"prune.loss": "kd"}, "prune.loss is 'kd', which needs a teacher"),
        ({"loss.name": "dlb", "loss.label_smoothing": 0.1}, "label_smoothing is not known to loss 'dlb'"),
        ({"coreset.fraction": 0}, "above 0"),
        ({"model.name.x": 1}, "not a group"),
        ({"train": 3}, "train has to be a group"),
    ],
)
def test_mistakes_are_named_with_the_way_out(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("epsd", changes)


def test_sources_that_are_no_recipes(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'epsd'"):
        load_recipe("epds")
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {epochs: 3")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(bad)
    bad.write_text("- 1\n- 2\n")
    with pytest.raises(RecipeError, match="mapping of keys"):
        load_recipe(bad)
    with pytest.raises(RecipeError, match="key=value"):
        parse_setting("train.epochs")
