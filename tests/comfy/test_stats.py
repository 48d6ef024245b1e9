"""The monitor's sample in words."""

from comfyui_tpu.comfy.stats import describe_sample

SPACE = {"used": 2**30, "total": 2**32}
SAMPLE = {"cpu": 5.0, "ram": SPACE, "disks": [], "unavailable": {}, "chips": [], "held": {}}


def test_what_the_devices_hold_is_listed():
    sample = {**SAMPLE, "held": {"vae of wan": 2**30 // 2, "transformer of wan": 3 * 2**30}}
    lines = describe_sample(sample).splitlines()
    assert "In memory: vae of wan 0.50 GiB" in lines
    assert "In memory: transformer of wan 3.00 GiB" in lines
    assert not [line for line in describe_sample(SAMPLE).splitlines() if line.startswith("In memory")]
