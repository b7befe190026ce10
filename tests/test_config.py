"""Validation and serialisation of the configuration."""

import json
import pickle
import subprocess
import sys

import pytest

import rein
from rein.errors import InputError


def test_a_configuration_is_the_same_after_json():
    config = rein.ReinConfig(num_tokens=7, rank=None, query_dim=None, use_softmax=False, scale_init=1, zero_init=True)
    assert rein.ReinConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        rein.ReinConfig().rank = 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_tokens", 0, "num_tokens is 0; it must be a whole number of at least 1"),
        ("num_tokens", None, "num_tokens is None"),
        ("rank", 2.0, "rank is 2.0; it must be a whole number of at least 1, or None"),
        ("rank", True, "rank is True"),
        ("query_dim", -1, "query_dim is -1"),
        ("use_softmax", 1, "use_softmax is 1; it must be True or False"),
        ("share", None, "share is None"),
        ("scale_init", float("nan"), "scale_init is nan; it must be a finite number"),
        ("scale_init", "0.1", "scale_init is '0.1'"),
    ],
)
def test_values_out_of_range_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        rein.ReinConfig(**{field: value})


def test_unknown_keys_and_presets_are_refused():
    with pytest.raises(InputError, match=r"unknown ReinConfig keys \['depth'\]; known keys are .* upgrade rein"):
        rein.ReinConfig.from_dict({"depth": 3})
    with pytest.raises(InputError, match=r"no preset is named 'full'; choose one of \['core', 'link', 'lowrank', 'share'\]"):
        rein.ReinConfig.preset("full")


def test_the_module_imports_the_standard_library_only():
    program = "import sys; before = set(sys.modules); import importlib.util as u; import types\n"
    program += "sys.modules['rein'] = types.ModuleType('rein'); sys.modules['rein'].__path__ = [sys.argv[1]]\n"
    program += "import rein.config; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, next(iter(rein.__path__))], check=True)


def test_a_message_that_quotes_a_long_value_keeps_its_start_and_its_remedy():
    with pytest.raises(InputError) as caught:
        rein.ReinConfig(num_tokens=[None] * 10_000)
    message = str(caught.value)
    assert message.startswith("ReinConfig.num_tokens is [None,")
    assert message.endswith("None]; it must be a whole number of at least 1.")
    assert len(message) < 4100
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    assert str(rein.MissingExtraError("a" * 10_000)).count("a") == 4000
