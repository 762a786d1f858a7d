"""What a task does to the models that it builds."""

import torch
from torch import nn

from fedelta.core.examples import Examples
from fedelta.learning.objectives import LanguageModel
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task


def test_caches_are_off_in_the_working_copy_and_the_builders_configuration_stays_as_it_is() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, use_cache=True
    )

    def build() -> nn.Module:
        return LlamaForCausalLM(config)

    task = Task(model=build, objective=LanguageModel())
    working = task.flat(0, Plan().plain).module
    rows = Examples({"input_ids": torch.ones(2, 4, dtype=torch.int64)}, torch.ones(2, 4, dtype=torch.int64))
    with torch.no_grad():
        assert working(**rows.inputs).past_key_values is None
        assert task.build(0)(**rows.inputs).past_key_values is not None
    assert config.use_cache is True
