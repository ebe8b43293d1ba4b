"""The options as a JSON schema, for editors: made of the declarations by which the options are checked."""

from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from tlw_basicsr.engine import schema
from tlw_basicsr.losses.tlw_loss import describe_options
from tlw_basicsr.registry import OURS, find_origin, find_package, is_open_ended, list_names, lookup
from tlw_basicsr.util.kinds import ANY, NAMES_OR_TEXT, Option, describe_parameters

Json = dict[str, Any]
NULL: Json = {"type": "null"}


def write_schema() -> Json:
    """Return the JSON schema (draft 7) of training and test YAMLs, with all that is registered with BasicSR now.

    It refuses nothing that the check accepts: models and data sets may read keys that no declaration knows, so most
    sections are open.
    """
    top = describe_parameters(schema.TopOptions)
    network, loss = refer("network"), {"anyOf": [refer("loss"), NULL]}
    typed: Json = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}
    train = section(
        describe_parameters(schema.TrainOptions),
        {
            "tlw": nullable(section(describe_options(), strict=True)),
            "uncertainty": section(describe_parameters(schema.UncertaintyOptions), strict=True),
            "scheduler": typed,
        },
        {"^optim_": typed, "_opt$": loss},
        required=("total_iter", "optim_g", "scheduler"),
    )
    metrics = {"type": ["object", "null"], "additionalProperties": refer("metric")}
    path = {
        "resume_state": {"type": ["string", "null"]},
        "ignore_resume_networks": nullable(dict(NAMES_OR_TEXT.schema)),
        "strict_load": {"type": ["boolean", "null"]},
    }
    texts, flags = {"type": ["string", "null"]}, {"type": ["boolean", "null"]}
    networks = {"^pretrain_network_": texts, "^param_key_": texts, "^strict_load_": flags}
    sections = {
        "datasets": {"type": "object", "patternProperties": {"^(train|val|test)(_|$)": refer("dataset")}},
        "train": train,
        "val": nullable(section(describe_parameters(schema.ValOptions), {"metrics": metrics}, required=("save_img",))),
        "logger": section(
            describe_parameters(schema.LoggerOptions), required=("print_freq", "save_checkpoint_freq", "use_tb_logger")
        ),
        "path": section({}, path, networks),
        "dist_params": nullable(section(describe_parameters(schema.DistOptions), strict=True)),
    }
    known = {  # unless a plugin may register more
        "patternProperties": {"^network_": typed_as(ARCH_REGISTRY)},
        "properties": {
            "model_type": {"enum": list_names(MODEL_REGISTRY)},
            "base_model": {"enum": list_names(MODEL_REGISTRY)},
            "datasets": {"additionalProperties": typed_as(DATASET_REGISTRY)},
            "train": {"patternProperties": {"_opt$": typed_as(LOSS_REGISTRY)}},
        },
    }
    datasets = {
        name: section(describe_parameters(schema.DATASET_SECTIONS[find_origin(part)]), strict=find_origin(part) == OURS)
        for name, part in parts(DATASET_REGISTRY)
    }
    for each in datasets.values():
        each["properties"].update(phase={}, scale={})
    required = ("name", "model_type", "num_gpu", "datasets", "network_g", "path")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Options of a BasicSR training or test, with or without TLW",
        **section(top, sections, {"^network_": network}, required=required),
        "anyOf": [{"required": ["train", "logger"]}, {"required": ["val"]}],
        "if": {"properties": {"plugins": {"type": "array", "minItems": 1}}, "required": ["plugins"]},
        "then": {},
        "else": known,
        "definitions": {
            "network": one_by_type(arguments(ARCH_REGISTRY)),
            "loss": one_by_type(arguments(LOSS_REGISTRY, {"distance": nullable(refer("loss"))})),
            "metric": one_by_type(arguments(METRIC_REGISTRY, {"better": {"enum": ["higher", "lower"]}}, METRIC_IMAGES)),
            "dataset": one_by_type(datasets),
        },
    }


METRIC_IMAGES = ("img", "img1", "img2")  # parameters of a metric that are no options


def refer(name: str) -> Json:
    """Return a reference to a definition."""
    return {"$ref": f"#/definitions/{name}"}


def nullable(json: Json) -> Json:
    """Return the schema of what may also be ``~``."""
    return {"anyOf": [json, NULL]}


def write_option(option: Option) -> Json:
    """Return the schema of one option, with its meaning and default."""
    json = {**option.kind.schema}
    if text := "; ".join(filter(None, (option.meaning, option.kind.text if option.kind is not ANY else ""))):
        json["description"] = text
    if isinstance(option.default, str | int | float | bool):
        json["default"] = option.default
    return json


def section(
    options: Mapping[str, Option],
    special: Mapping[str, Json] | None = None,
    patterns: Json | None = None,
    required: Collection[str] = (),
    strict: bool = False,
) -> Json:
    """Return the schema of a section: its options, those of ``special`` by their own schema, and more by patterns."""
    properties = {name: write_option(option) for name, option in options.items()}
    for name, json in (special or {}).items():
        properties[name] = {**{k: v for k, v in properties.get(name, {}).items() if k == "description"}, **json}
    json: Json = {"type": "object", "properties": properties}
    if patterns:
        json["patternProperties"] = patterns
    if required:
        json["required"] = list(required)
    if strict:
        json["additionalProperties"] = False
    return json


def parts(registry: Any) -> list[tuple[str, Callable]]:
    """Return the names of a registry as options give them, with what they name."""
    return [(name, lookup(registry, {"type": name}, "")) for name in list_names(registry)]


def typed_as(registry: Any) -> Json:
    """Return the schema of a section whose ``type`` is a registered name."""
    return {"properties": {"type": {"enum": list_names(registry)}}}


def arguments(registry: Any, special: Mapping[str, Json] | None = None, extra: Collection[str] = ()) -> dict[str, Json]:
    """Return the schemas of all parts of a registry by their parameters, as ``registry.check_arguments`` takes them."""
    found = {}
    for name, part in parts(registry):
        options = describe_parameters(part, extra)
        if find_package(part) != OURS:
            options = {key: option._replace(kind=ANY) for key, option in options.items()}
        own = {key: json for key, json in (special or {}).items() if key in options or key == "better"}
        required = [key for key, option in options.items() if option.default is Parameter.empty]
        found[name] = section(options, own, required=required, strict=not is_open_ended(part))
    return found


def one_by_type(by_type: Mapping[str, Json]) -> Json:
    """Return the schema of a section whose ``type`` says which of several schemas holds."""
    cases = []
    for name, json in by_type.items():
        json["properties"] = {"type": {}, **json["properties"]}
        cases.append({"if": {"properties": {"type": {"const": name}}, "required": ["type"]}, "then": json})
    return {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}, "allOf": cases}
