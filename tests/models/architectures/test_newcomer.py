"""A vision-language model that transformers does not know: found by its structure, edited like the others."""

import torch
import transformers as hf
from dualedit import add_edit, inject_dualedit
from dualedit.models.architectures import find_decoder_layers
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .case import logits_of
from .parts import BOS, EOS, IMAGE, PAD, WORDS, batch, text


class NewcomerConfig(hf.LlamaConfig):
    model_type = "newcomer"


class Newcomer(hf.PreTrainedModel, hf.GenerationMixin):
    """Two lists of layers of one length, under names of its own."""

    config_class = NewcomerConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_eyes = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4)])
        self.bridge = nn.Linear(12, config.hidden_size)
        self.brain = hf.LlamaModel(config)
        self.mouth = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.brain.embed_tokens

    def get_output_embeddings(self):
        return self.mouth

    def forward(self, input_ids, attention_mask=None, pixel_values=None, past_key_values=None, use_cache=None,
                **kwargs):  # fmt: skip
        embedded = self.brain.embed_tokens(input_ids)
        if pixel_values is not None:
            for layer in self.vision_eyes:
                pixel_values = layer(pixel_values)
            place = (input_ids == IMAGE)[..., None].expand_as(embedded)
            embedded = embedded.masked_scatter(place, self.bridge(pixel_values))
        out = self.brain(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=use_cache,
                         past_key_values=past_key_values)  # fmt: skip
        return CausalLMOutputWithPast(logits=self.mouth(out[0]), past_key_values=out.past_key_values)


def built(seed):
    torch.manual_seed(seed)
    sizes = text(None)
    model = Newcomer(NewcomerConfig(**sizes)).eval().requires_grad_(False)
    model.config.image_token_id = IMAGE
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.2 / module.in_features**0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model


def test_an_unregistered_model(generator, seed):
    base, edited = built(seed), built(seed)
    assert find_decoder_layers(base)[0] == "brain.layers"
    rows = []
    for _ in range(2):
        words = torch.randint(3, WORDS, (4,), generator=generator).tolist()
        ids = torch.tensor([[BOS, IMAGE, IMAGE, *words]])
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                     "pixel_values": torch.randn(1, 2, 12, generator=generator)})  # fmt: skip
    model = inject_dualedit(
        edited, text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False
    )
    add_edit(model, rows[0], torch.tensor([5, 6]))
    both = batch(rows)
    ours, theirs = logits_of(model, both), logits_of(base, both)
    assert not torch.equal(ours[0, -1], theirs[0, -1]) and torch.equal(ours[1], theirs[1])
    new = dict(max_new_tokens=3, do_sample=False, eos_token_id=10_000, pad_token_id=PAD,
               suppress_tokens=[EOS, IMAGE])  # fmt: skip
    assert torch.equal(model.generate(**rows[1], **new), base.generate(**rows[1], **new))
