"""A random model and a few digits: enough for the real path from a parquet file to an update."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model folder that is missing must not be looked for elsewhere
# Tests that run at a time share the cores: OpenMP's threads wait by spinning, and on one core for one another.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

import shutil
import subprocess
from collections import Counter

import pytest
import ranks
import torch
from answering import CORPUS, write_answering
from hypothesis import settings

from vogue.config import load_config
from vogue.data import Sample, load_samples, write_parquet
from vogue.data.digits import digits_samples, write_digits
from vogue.inputs import Preprocessor
from vogue.tiny import build_model, build_processor

settings.register_profile("shared machine", deadline=None)  # others use it, so that a time limit says nothing
settings.load_profile("shared machine")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    left_out = ("long", "chaos")
    for item in items:
        if any(map(item.get_closest_marker, left_out)):
            item.add_marker("slow")  # so that `-m "not slow"`, which takes the place of `-m "not long"`, leaves it out
    slow = Counter(
        x.path for x in items if x.get_closest_marker("slow") and not any(map(x.get_closest_marker, left_out))
    )
    items.sort(key=lambda item: -slow[item.path])  # the slowest files first: two workers then end together


@pytest.fixture(scope="session")
def processor():
    """Byte-level: 256 bytes, the special tokens, and a few merges."""
    return build_processor(CORPUS, vocab_size=300)


@pytest.fixture
def preprocessor(processor):
    return Preprocessor(processor, "Think.", 512)


@pytest.fixture(scope="session")
def new_model(processor):
    """A function: a random float32 model, larger where asked for; equal seeds give equal weights."""

    def build(seed=0, scale=4.0, **size):
        torch.manual_seed(seed)
        model = build_model(processor, **({"hidden_size": 64, "layers": 2, "vision_layers": 2} | size)).eval()
        # Fresh weights predict every token alike; larger ones make entropies, divergences and ratios worth comparing.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
        return model

    return build


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, processor, new_model, samples):
    """A Hugging Face folder, as `vogue warmstart` leaves it: a model that answers in the format, with any digit."""
    return write_answering(new_model(), processor, samples, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def wide_model_folder(tmp_path_factory, processor, new_model, samples):
    """The same of a model whose layers can be cut in two: every attention has two heads or more."""
    return write_answering(new_model(hidden_size=128), processor, samples, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """train.parquet with 24 samples, validation.parquet with 4, test.parquet with 6."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, train=24, validation=4, test=6)
    return folder


@pytest.fixture(scope="session")
def mixed_data(digits_folder, tmp_path_factory):
    """Digits, and problems without an image between them: often one rank has images and the other none."""
    samples = list(load_samples(digits_folder / "train.parquet"))
    for i in range(0, len(samples), 3):
        samples[i] = Sample(f"What is {i} + 1?", str(i + 1), ())
    path = tmp_path_factory.mktemp("mixed") / "train.parquet"
    write_parquet(samples, path)
    return path


@pytest.fixture(scope="session")
def samples():
    return digits_samples("train", 6, seed=0)


@pytest.fixture
def settings(model_folder, digits_folder, tmp_path):
    """The `key=value` settings of a small run; append others to override them."""
    return [
        f"model.path={model_folder}",
        "model.dtype=float32",
        f"data.train={digits_folder}/train.parquet",
        f"data.test={digits_folder}/test.parquet",
        "data.system_prompt=Think.",
        "data.max_prompt_tokens=128",
        "branch.rollout=drawn",
        "rollout.engine=hf",
        "rollout.prompts=4",
        "rollout.n=2",
        "rollout.max_tokens=12",
        "optimizer.lr=1e-3",
        "trainer.steps=4",
        "trainer.measure_every=0",
        f"trainer.output_dir={tmp_path}/run",
    ]


@pytest.fixture
def no_float32(monkeypatch):
    """transformers' norms, rotations and routers compute in float32 in a float64 model too; here they don't."""
    to, as_type, softmax = torch.Tensor.to, torch.Tensor.type, torch.nn.functional.softmax

    def wide(tensor, *arguments, **named):
        named |= {"dtype": torch.float64} if named.get("dtype") is torch.float32 else {}
        return to(tensor, *(torch.float64 if x is torch.float32 else x for x in arguments), **named)

    monkeypatch.setattr(torch.Tensor, "to", wide)

    def wide_type(tensor, *arguments, **named):
        return as_type(tensor, *(torch.float64 if x is torch.float32 else x for x in arguments), **named)

    def wide_softmax(tensor, *arguments, **named):
        named |= {"dtype": torch.float64} if named.get("dtype") is torch.float32 else {}
        return softmax(tensor, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "type", wide_type)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A headless Chromium, started once."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver aren't both installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def on_a_disk(tmp_path):
    """A function: run Python beside a small or read-only `disk`; skips where no file system may be mounted."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    return lambda options, *arguments: ranks.on_a_disk(tmp_path, options, *arguments)


@pytest.fixture
def config(settings):
    """A function: the configuration of a small run, with overrides."""
    return lambda *overrides: load_config(None, [*settings, *overrides])


@pytest.fixture
def new_loader(config):
    """A function: the loader of a run with these settings, of one rank of so many."""

    from vogue.data.dataset import check_samples
    from vogue.step.loader import Loader
    from vogue.step.run_state import RunState

    def build(*overrides, rank=0, ranks=1):
        chosen = config(*overrides)
        preprocessor = Preprocessor.of(chosen)
        data = check_samples(load_samples(chosen.data.train), preprocessor.lengths)
        return Loader(chosen, data, preprocessor, RunState(), rank, ranks)

    return build


@pytest.fixture
def new_trainer(config):
    """A function: a trainer of one rank, unpartitioned (stage 0), so that gradients are plain ones."""
    from vogue.data.dataset import check_samples
    from vogue.trainer import Trainer

    def build(*overrides):
        chosen = config("trainer.deepspeed.zero_optimization.stage=0", *overrides)
        preprocessor = Preprocessor.of(chosen)
        data = check_samples(load_samples(chosen.data.train), preprocessor.lengths)
        return Trainer(chosen, data, preprocessor, resume=None)

    return build
