"""The config of a nemotron-nas checkpoint. Travels with the export; needs only transformers.

Serving engines read `config.block_configs[layer].attention.no_op` and the like: attributes, where config.json has objects.
"""
from transformers import LlamaConfig


class Block(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    """A Llama whose layers have their own head groups and FFN widths; the sizes of the whole are its parent's."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block({key: Block(part) for key, part in block.items()}) for block in block_configs]
