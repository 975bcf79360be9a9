"""Models that transformers does not have, as weights under their own names; how they run is said elsewhere.

Thus a checkpoint is read without running the code that came with it.
"""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


class BareModel(PreTrainedModel):
    """The weights between embedding and head; a subclass names the classes of its parts."""

    layer_class = norm_class = rotary_class = None

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = self.norm_class(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config)
        self.post_init()


class BareForCausalLM(PreTrainedModel):
    """The whole model; a subclass names the class of what lies between embedding and head."""

    model_class = None
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register(model):
    """Tell transformers of a :class:`BareForCausalLM`, whose checkpoints it can then read; a decorator."""
    AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
    return model
