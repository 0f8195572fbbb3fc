"""Built-in sets of contrastive pairs."""

from __future__ import annotations

from expert_registry.errors import UsageError, one_of
from vllm_steermoe_plugin.detection.recipes.lab import LAB_RECIPES, lab_recipe
from vllm_steermoe_plugin.detection.recipes.paper import PAPER_RECIPES
from vllm_steermoe_plugin.detection.recipes.recipe import PairSampling, Recipe
from vllm_steermoe_plugin.models import lab_checkpoint


def find_recipe(name: str, model: str, sampling: PairSampling | None = None) -> Recipe:
    """A recipe by its name: for steermoe-lab its own three and `safety`, else those of the paper.

    Args:
        name: of the recipe.
        model: that will be looked at; the recommended numbers depend on it.
        sampling: of its pairs.

    Raises:
        UsageError: an unknown recipe, or a file for one that takes none.
        DataError: the data cannot be had.
    """
    sampling = sampling or PairSampling()
    # The names that the paper has too mean its pairs when the model is another.
    if name in LAB_RECIPES and (model == lab_checkpoint.NAME or name not in PAPER_RECIPES):
        if sampling.data_file is not None:
            raise UsageError(f"recipe {name!r} of {lab_checkpoint.NAME} takes no --data-file")
        pairs, described = lab_recipe(model, name, sampling.seed)
        return Recipe(pairs.first(sampling.limit), described)
    if name not in PAPER_RECIPES:
        raise UsageError(one_of(name, {*PAPER_RECIPES, *LAB_RECIPES}, "recipe"))
    return PAPER_RECIPES[name](model, sampling)
