"""Prompts in, completions out, weights in: the engine that generates, by vLLM or by transformers.

`engine.py` says what an engine is; `vllm.py` and `hf.py`, where vLLM can't be installed, are the two that there are.
"""

from transformers import PreTrainedModel, ProcessorMixin

from vogue.config import Config
from vogue.rollout.engine import Engine


def create_engine(config: Config, processor: ProcessorMixin, model: PreTrainedModel | None = None) -> Engine:
    """Start the engine `config.rollout.engine` with the weights of `config.model.path`.

    `model` is the one whose weights it is to follow, if any. Raises `ImportError` naming the extra where the engine
    isn't installed.
    """
    if config.rollout.engine == "vllm":
        from vogue.rollout.vllm import VllmEngine

        return VllmEngine(config, processor, model)
    from vogue.rollout.hf import HfEngine

    return HfEngine(config, processor)
