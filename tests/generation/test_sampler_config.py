import pytest

from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.runtime.config import parse_config


def test_its_arguments_are_those_of_the_pipeline():
    config = SamplerConfig(guidance_scale=2.0, guidance_channels=3)
    assert config.sampler == {
        "num_inference_steps": None,  # the pipeline's own
        "guidance_scale": 2.0,
        "guidance_interval": (0.0, 1.0),
        "guidance_channels": 3,
    }


def test_its_guidance_as_options():
    assert SamplerConfig(num_inference_steps=5).guidance_words == ""
    config = SamplerConfig(guidance_scale=3.5, guidance="internal", guidance_interval=(0.0, 0.9))
    assert config.guidance_words == " --guidance_scale 3.5 --guidance internal --guidance_interval 0.0 0.9"
    again = parse_config(SamplerConfig, config.guidance_words.split())
    assert again == config


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("num_inference_steps", 0, "a positive number"),
        ("guidance_scale", 0.5, "1 or more"),
        ("guidance_interval", (0.0, 1.5), r"a number in \[0, 1\]"),
        ("guidance_interval", (0.5, 0.2), "the smaller number first"),
        ("guidance_channels", 0, "a positive number"),
        ("seed", -1, "0 or a positive number"),
        ("batch_size", 0, "a positive number"),
        ("tolerance", 0.1, ""),
    ],
)
def test_what_cannot_be_is_refused(option, value, expected):
    with pytest.raises(ValueError, match=f"{option} is .*, (expected {expected}|but only solver dopri5 has one)"):
        SamplerConfig(**{option: value})
