"""The catalogue's configs: complete, of the size they are known for, and the classes' defaults where they say so."""

import inspect
import json

import diffusers
import jax
import numpy as np
import pytest

from comfyui_tpu.plan import catalogue
from comfyui_tpu.plan.rehearsal import open_model
from comfyui_tpu.runtime.errors import PlanError

# Parameters in billions, as these models are described everywhere. The Mistral text encoder is without its last ten
# layers, its vision tower and its output head; UMT5 and T5 v1.1 XXL are encoders only.
BILLIONS = {
    "flux.2-dev": {"transformer": 32, "text_encoder": 17.3, "vae": 0.084},
    "cogvideox1.5-5b": {"transformer": 5.57, "text_encoder": 4.76, "vae": 0.216},
    "cogvideox-5b": {"transformer": 5.57, "text_encoder": 4.76, "vae": 0.216},
    "wan2.1-t2v-14b": {"transformer": 14.3, "text_encoder": 5.68, "vae": 0.127},
    "wan2.1-t2v-1.3b": {"transformer": 1.42, "text_encoder": 5.68, "vae": 0.127},
    "wan2.2-i2v-a14b": {"transformer": 14.3, "transformer_2": 14.3, "text_encoder": 5.68, "vae": 0.127},
}


@pytest.mark.parametrize("name", catalogue.CATALOGUE)
def test_every_component_has_the_size_its_model_is_known_for(name, tmp_path):
    folder = catalogue.write(catalogue.entry(name).configs, tmp_path)
    model = open_model(folder, tuple(jax.devices()[:1]))
    found = {c.spec.name: sum(np.prod(w.shape) for w in c.skeleton.weights.values()) for c in model.components}
    assert {component: size / 1e9 for component, size in found.items()} == pytest.approx(BILLIONS[name], rel=0.02)


@pytest.mark.parametrize("name", catalogue.CATALOGUE)
def test_every_key_is_one_its_class_takes(name):
    for file, config in catalogue.entry(name).configs.items():
        if file == "model_index.json" or "architectures" in config:
            continue
        cls = getattr(diffusers, config["_class_name"])
        assert set(config) - {"_class_name"} <= set(inspect.signature(cls.__init__).parameters), file


def test_models_said_to_be_their_classes_defaults_are():
    """FLUX.2-dev was published with the defaults; Wan's 14 B transformer and autoencoder are defaults too."""
    for name, files in (("flux.2-dev", ("transformer", "vae")), ("wan2.1-t2v-14b", ("transformer", "vae"))):
        for file in files:
            config = dict(catalogue.entry(name).configs[f"{file}/config.json"])
            parameters = inspect.signature(getattr(diffusers, config.pop("_class_name")).__init__).parameters
            defaults = json.loads(json.dumps({key: parameters[key].default for key in config}))
            assert config == defaults, (name, file)


def test_cutting_leaves_two_blocks_of_each_kind_and_the_catalogue_as_it_was():
    cut = catalogue.with_blocks(catalogue.entry("flux.2-dev").configs, 2)["transformer/config.json"]
    assert (cut["num_layers"], cut["num_single_layers"]) == (2, 2)
    assert catalogue.entry("flux.2-dev").configs["transformer/config.json"]["num_single_layers"] == 48


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(PlanError, match=r"wan2\.2-i2v-a14b"):
        catalogue.entry("wan")
