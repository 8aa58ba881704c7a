"""Leaves the terminal to vogue, whatever the libraries below it have to say."""

import os
import warnings


def quiet() -> None:
    """Keep the libraries from announcing themselves at length; before they are imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed finds by itself, with a warning
    from transformers.utils import logging

    logging.disable_progress_bar()
