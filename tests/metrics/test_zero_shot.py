"""Zero-shot classification: CLIP's tokens, prompts and averages."""

import pytest
import torch
from open_clip import build_zero_shot_classifier, get_tokenizer
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

from vtp_diffusion import VTPModel
from vtp_diffusion.data.captions import clip_tokenizer
from vtp_diffusion.metrics.zero_shot import class_embeddings, imagenet_prompts, zero_shot_scores

NAMES = ["cat", "golden retriever", "traffic light"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {f"{part}_hidden_size": 16 for part in ("encoder", "decoder", "text")}
    sizes |= {f"{part}_num_layers": 1 for part in ("encoder", "decoder", "text")}
    sizes |= {f"{part}_num_attention_heads": 2 for part in ("encoder", "decoder", "text")}
    return VTPModel(sample_size=32, patch_size=8, latent_channels=4, projection_dim=12, **sizes).eval()


class OpenClipInterface(torch.nn.Module):
    """The method that open_clip's classifier calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode_text(self, tokens, normalize):
        return self.model.get_text_features(tokens, normalize=normalize)


def test_class_embeddings_are_open_clips(model):
    names, templates = imagenet_prompts()
    assert len(names) == 1000 and names[207] == "Golden Retriever" and len(templates) == 80
    found = class_embeddings(model, NAMES, templates[:7], clip_tokenizer(77), batch_size=5)
    peer = OpenClipInterface(model)
    expected = build_zero_shot_classifier(peer, get_tokenizer("ViT-B-32"), NAMES, OPENAI_IMAGENET_TEMPLATES[:7])
    assert torch.allclose(found, expected.T, atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_an_image_is_most_like_the_class_of_its_own_feature(model):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = model.get_image_features(images)
    scores = zero_shot_scores(model, images.split(2), features)
    assert scores.argmax(1).tolist() == list(range(5)) and torch.allclose(scores.diagonal(), torch.ones(5))


def test_tokens_fit_or_are_refused_or_cut(model):
    text = "a photo of a golden retriever"
    with pytest.raises(ValueError, match="8 tokens long, the context holds 6"):
        clip_tokenizer(6)([text])
    assert clip_tokenizer(6, truncate=True)([text]).tolist() == [[49406, 320, 1125, 539, 320, 49407]]
    with pytest.raises(ValueError, match="no {} for the name"):
        class_embeddings(model, NAMES, ["a photo"], clip_tokenizer(77))
    with pytest.raises(ValueError, match="0 class names and 1 templates"):
        class_embeddings(model, [], ["{}"], clip_tokenizer(77))
    with pytest.raises(ValueError, match="no images"):
        zero_shot_scores(model, [], torch.zeros(3, 12))
