"""What an export will weigh, and how fast it will run on a known device, before it is made.

mobilellm inspect examples/mobilellm-r1-nano --device pixel-8
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from devices.catalogue import KnownDevice, known_device
from devices.errors import DeviceError
from devices.prediction import Speed, Workload, predict_on
from exporter.backends import Prediction, Target, check_context, front
from exporter.backends._sizes import stored_bytes
from exporter.calibration.quantize import quantization_plan
from exporter.errors import InputError
from exporter.model.checkpoint import Checkpoint
from exporter.model.config import ModelConfig
from exporter.quantization.schemes import Scheme
from exporter.recipe import Recipe, recipes_for


@dataclass(frozen=True)
class Forecast:
    """What one recipe would make of a checkpoint for one target, or why it cannot."""

    recipe: str
    target: str
    prediction: Prediction | None
    problem: str = ""
    #: On a device of the catalogue: at an empty cache, and at a full one.
    speeds: tuple[Speed, ...] = ()


def catalogue_device(key: str) -> KnownDevice:
    """A device that `mobilellm devices` knows. Raises InputError."""
    try:
        return known_device(key)
    except DeviceError as error:
        raise InputError(f"--device {key}", error.problem, error.remedy) from error


def forecast_recipes(checkpoint: Checkpoint, device: KnownDevice | None = None) -> list[Forecast]:
    """What the recipes for a checkpoint of this name would make of it."""
    recipes = recipes_for(checkpoint.path.name)
    return [one for recipe in recipes for one in forecast(recipe, checkpoint, device)]


def forecast(
    recipe: Recipe, checkpoint: Checkpoint, device: KnownDevice | None = None
) -> list[Forecast]:
    """The predicted sizes for every target of a recipe, and the speeds on a device; needs no
    toolkit. A budget is taken to be used up."""
    try:
        schemes = quantization_plan(recipe.quantization, checkpoint).schemes
    except InputError as error:
        return [Forecast(recipe.name, target.target, None, str(error)) for target in recipe.targets]
    config, forecasts = checkpoint.config, list[Forecast]()
    for target in recipe.targets:
        try:
            check_context(config, target)
        except InputError as error:
            problem = f"{error.subject} {error.problem}"
            forecasts.append(Forecast(recipe.name, target.target, None, problem))
            continue
        predicted: Prediction = front(target.target).predict(config, schemes, target)
        speeds: tuple[Speed, ...] = ()
        if device is not None:
            work = workload(config, schemes, target)
            speeds = tuple(predict_on(work, device, d) for d in (0, target.max_context))
        predicted = _within_budget(predicted, recipe, config, schemes)
        forecasts.append(Forecast(recipe.name, target.target, predicted, speeds=speeds))
    return forecasts


def _within_budget(
    prediction: Prediction, recipe: Recipe, config: ModelConfig, schemes: Mapping[str, Scheme]
) -> Prediction:
    if not recipe.quantization.budget:
        return prediction
    from exporter.calibration.sensitivity import model_bits, parse_budget

    budget = parse_budget(recipe.quantization.budget, "quantization.budget", config)
    more = max(0, budget - model_bits(schemes, config)) // 8
    return replace(prediction, file=prediction.file + more, memory=prediction.memory + more)


def workload(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Workload:
    """What a decode step reads and multiplies: every matrix but a lookup table, and the cache."""
    shapes = config.parameter_shapes()
    multiplied = [name for name in shapes if config.is_multiplied(name)]
    sizes: Prediction = front(target.target).predict(config, schemes, target)
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return Workload(
        weight_bytes=sum(stored_bytes(schemes[name], shapes[name]) for name in multiplied),
        products=sum(math.prod(shapes[name]) for name in multiplied),
        cache_bytes=sizes.kv_cache // target.max_context,
        cache_products=2 * heads,
        memory=sizes.memory,
    )
