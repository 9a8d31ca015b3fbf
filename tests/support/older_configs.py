"""Adapts configs of the newest transformers release to older releases."""

import copy

import transformers

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def adapted_config(config, kind=None):
    """The config with the key names of the installed release, at any depth.

    ``kind`` is the config class, if known: before 4.52 some have the text options at the top level.
    """
    if not isinstance(config, dict):
        return copy.deepcopy(config)
    config = {name: adapted_config(value) for name, value in config.items()}
    if RELEASE < (5, 0) and "rope_parameters" in config:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = rope
    if RELEASE < (4, 52) and kind is not None and "text_config" not in kind.sub_configs:
        config |= config.pop("text_config", {})
    return config
