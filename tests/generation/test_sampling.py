import torch
from test_pipeline_lightning_dit import tiny_pipeline, tiny_transformer

from vtp_diffusion.generation.sampling import reset_networks


def test_an_untrained_pipeline_has_no_trained_guide():
    pipe = tiny_pipeline(guidance_transformer=tiny_transformer(seed=1))
    reset_networks(pipe, seed=5)
    first = {name: getattr(pipe, name).state_dict() for name in ("transformer", "guidance_transformer")}
    trained = {"transformer": tiny_transformer(), "guidance_transformer": tiny_transformer(seed=1)}
    for name, state in first.items():
        assert not all(torch.equal(value, state[key]) for key, value in trained[name].state_dict().items())
    alone = tiny_pipeline()  # with the weights that it has beside a guide
    reset_networks(alone, seed=5)
    assert alone.guidance_transformer is None and not alone.transformer.training
    assert all(torch.equal(value, first["transformer"][key]) for key, value in alone.transformer.state_dict().items())
