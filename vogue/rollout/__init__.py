"""Prompts in, completions out, weights in: the engine that generates, by vLLM or by transformers.

`engine.py` says what an engine is; `vllm.py`, `server_engine.py` and, where vLLM can't be installed, `hf.py` are three.
"""

from itertools import chain

from transformers import PreTrainedModel, ProcessorMixin

from vogue.config import Config
from vogue.model.files import check_experts, check_finite, read_checkpoint
from vogue.model.lora import load_adapted, saved_buffers, whole_parameters
from vogue.rollout.engine import Engine
from vogue.run.memory import check_engine, check_length


def create_engine(config: Config, processor: ProcessorMixin, model: PreTrainedModel | None = None) -> Engine:
    """Start the engine `config.rollout.engine` with the weights of `config.model.path` and `config.lora.adapter`.

    `model` is the one whose weights it is to follow, if any, and that gives it an adapter's; `hf` generates with that
    very model where it is whole. Without one, what loading the model would check is checked here, on its files, and
    raises `ConfigError`. Raises `ImportError` naming the extra where the engine isn't installed.
    """
    if model is None:
        _check_model(config)
        if config.lora.adapter:
            return _with_adapter(config, processor)
    if config.rollout.engine == "vllm":
        from vogue.rollout.vllm import VllmEngine

        return VllmEngine(config, processor, model)
    if config.rollout.engine == "server":
        from vogue.rollout.server_engine import ServerEngine

        return ServerEngine(config, processor, model)
    from vogue.rollout.hf import HfEngine

    return HfEngine(config, processor, model)


def _with_adapter(config: Config, processor: ProcessorMixin) -> Engine:
    """An engine of a model with an adapter, which vLLM gets merged into its weights, in the host's memory first."""
    model = load_adapted(config.model.path, config.model.dtype, config.lora)
    engine = create_engine(config, processor, model)
    merged = ((whole.name, whole.merged()) for whole in whole_parameters(model))
    engine.load_weights(chain(merged, saved_buffers(model).items()), version=0)
    return engine


def _check_model(config: Config) -> None:
    checkpoint = read_checkpoint(config.model.path)
    check_length(checkpoint.model.config.get_text_config(), config)
    if config.rollout.engine != "hf":
        check_experts(checkpoint)
        if not config.rollout.servers:
            check_engine(checkpoint.model, config)
    check_finite(config.model.path, checkpoint.files)
