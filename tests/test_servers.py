"""Servers of vLLM: what they generate, how they get weights, and what becomes of a step when one of them dies."""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from ranks import environment, launch
from test_engines import base_settings, disagreement, requests_of

from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.inputs import Preprocessor
from vogue.metrics import Means
from vogue.rollout import create_engine
from vogue.rollout.engine import EngineError
from vogue.rollout.sampling import Sampling
from vogue.rollout.server_client import KEY, Server, ServerLost
from vogue.rollout.server_weights_folder import WeightFolder
from vogue.rollout.serving import check_servers, serve, start_servers
from vogue.run.training import run
from vogue.settings import ConfigError
from vogue.step import engine_check
from vogue.trainer import Trainer

pytestmark = pytest.mark.slow

SECONDS = 300.0  # that a server may take to start beside other tests
SAMPLING = Sampling(12)


class Started:
    """Two servers and their key, and the trainer that asks them."""

    def __init__(self, settings):
        self.settings = [*settings, "rollout.engine=server", f"rollout.server_timeout={SECONDS}"]
        # As with NCCL, whose place `nccl_on_cpu` takes where there is no GPU.
        engine = "{worker_extension_cls: nccl_on_cpu.Extension, weight_transfer_config: {backend: nccl}}"
        self.settings.append(f"rollout.engine_args={engine}")
        self.servers = start_servers(load_config(None, [*self.settings, "rollout.server_count=2"]))
        self.urls = [server.url for server in self.servers]
        os.environ[KEY] = self.servers[0].key
        self.trainer = self.new_trainer(f"rollout.servers=[{','.join(self.urls)}]")

    def new_trainer(self, *overrides, resume=None):
        config = load_config(None, [*self.settings, *overrides])
        preprocessor = Preprocessor.of(config)
        data = check_samples(load_samples(config.data.train), preprocessor.lengths)
        return Trainer(config, data, preprocessor, resume)

    def process(self, number):
        """The process of a server that this one has started."""
        port = self.urls[number].rpartition(":")[2]
        return next((child for child in psutil.Process().children() if port in child.cmdline()), None)

    def kill(self, number):
        found = self.process(number)
        family = [found, *found.children(recursive=True)] if found else []
        for one in family:
            one.kill()
        psutil.wait_procs(family)

    def restart(self, number):
        """Start a server of the same address, as a user does; it isn't up yet."""
        port = self.urls[number].rpartition(":")[2]
        command = [sys.executable, "-m", "vogue", "serve", *self.settings, "--port", port]
        self.restarted = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)

    def await_restarted(self, number):
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(ServerLost):
                return self.servers[number].label()
            assert self.restarted.poll() is None and time.monotonic() < end
            time.sleep(0.1)


@pytest.fixture(scope="module")
def started(model_folder, digits_folder, tmp_path_factory):
    settings = base_settings(model_folder, digits_folder / "train.parquet", tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        found = Started([*settings, "trainer.deepspeed.zero_optimization.stage=0", "optimizer.lr=1e-3"])
        yield found
    os.environ.pop(KEY, None)
    found.kill(1)  # which may have been started anew, and doesn't end with this process


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def test_servers_generate_what_the_policy_thinks_and_follow_every_part_of_it(started):
    trainer = started.trainer
    assert [server.url for server in trainer.engine._live] == started.urls
    assert disagreement(trainer) < 1e-3
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    assert disagreement(trainer) > 1e-2  # stale
    trainer.sync()
    assert disagreement(trainer) < 1e-3
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            parameter.copy_(before[name])
    trainer.sync()


def test_weights_reach_servers_by_vllms_transfer_and_a_server_that_has_lost_them_gets_them_again(started, monkeypatch):
    from nccl_on_cpu import take_place

    from vogue.rollout.server_weights_nccl import NcclTransfer  # which imports vLLM

    take_place(monkeypatch.setattr)
    trainer = started.trainer
    monkeypatch.setattr(trainer.engine, "_transfer", NcclTransfer(trainer.policy.model))
    for factor in (1.5, 1 / 1.5):  # the second time by the same group
        with torch.no_grad():
            for parameter in trainer.policy.model.parameters():
                parameter.mul_(factor)
        assert disagreement(trainer) > 1e-2
        trainer.sync()
        assert trainer.engine.up_to_date() and disagreement(trainer) < 1e-3
    started.servers[0].set_label("default")  # as it is after a restart: the group is made anew
    trainer.keep_up()
    assert trainer.engine.up_to_date() and len(trainer.engine._live) == 2
    trainer.engine._transfer._close()


PARTITIONED = """
import sys
import deepspeed, pytest, torch
from nccl_on_cpu import take_place
from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.distributed import leave
from vogue.inputs import Preprocessor
from vogue.metrics import Means
from vogue.rollout.engine import EngineError
from vogue.trainer import Trainer

config = load_config(None, [text for text in sys.argv[1:] if not text.startswith("--")])
preprocessor = Preprocessor.of(config)
trainer = Trainer(config, check_samples(load_samples(config.data.train), preprocessor.lengths), preprocessor, None)
from vogue.rollout.server_weights_nccl import NcclTransfer
take_place(setattr)
trainer.engine._transfer = NcclTransfer(trainer.policy.model)
parameters, item = list(trainer.policy.model.parameters()), trainer.loader.items(0)[0]
assert all(p.numel() == 0 for p in parameters), "nothing is partitioned"
for _ in range(2):
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)
    with pytest.raises(EngineError, match="it hasn't all of the policy's weights"):
        trainer.check_sync(item, Means())
    trainer.sync()
    means = Means()
    trainer.check_sync(item, means)
    assert trainer.engine.up_to_date() and means["mismatch/sync"].total < 1e-3
assert all(p.numel() == 0 for p in parameters), "something stays gathered"
if trainer.rank == 0:
    trainer.engine._transfer._close()
    print("sent")
leave(0)
"""


@pytest.mark.long
def test_weights_that_two_ranks_share_reach_servers_by_vllms_transfer(started, tmp_path):
    script = tmp_path / "partitioned.py"
    script.write_text(PARTITIONED)
    urls = f"rollout.servers=[{','.join(started.urls)}]"
    zero = "trainer.deepspeed.zero_optimization"
    stage = (f"{zero}.stage=3", f"{zero}.stage3_param_persistence_threshold=0")
    assert "sent" in launch(2, script, *started.settings, urls, *stage)
    started.trainer.sync()


def test_a_sync_that_left_something_old_is_found(started):
    trainer = started.trainer
    head = trainer.policy.model.get_input_embeddings().weight
    item = trainer.loader.items(0)[0]
    means = Means()
    trainer.check_sync(item, means)
    assert 0 < means["mismatch/sync"].total < 1e-3
    trainer.keep_up()
    with torch.no_grad():
        head.mul_(2)
        try:
            trainer.check_sync(item, means)
        finally:
            head.div_(2)
    with pytest.raises(EngineError, match=r"^after 0 steps .* it hasn't all of the policy's weights$"):
        trainer.keep_up()
    trainer.sync()
    trainer.check_sync(item, means)
    trainer.keep_up()


def test_a_step_after_which_servers_are_found_wanting_is_written_down_before_the_run_ends(
    started, tmp_path, monkeypatch
):
    monkeypatch.setitem(engine_check.MOST, "float32", 0.0)
    servers, folder = f"rollout.servers=[{','.join(started.urls)}]", f"trainer.output_dir={tmp_path}"
    with pytest.raises(EngineError, match=r"^after 1 steps .*\nstopped after 1 of 1 steps"):
        run(load_config(None, [*started.settings, servers, folder, "trainer.steps=1"]), None)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 0 and row["mismatch/sync"] > 0
    assert (tmp_path / "checkpoints/step_000001").is_dir()
    started.trainer.sync()


def test_nobody_without_the_key_changes_a_server(started):
    url = started.urls[0]
    for path in ("/collective_rpc", "/pause", "/inference/v1/generate", "/weight_info"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(url + path, b"{}", {"Authorization": "Bearer wrong"}))
        assert error.value.code == 401
    assert urllib.request.urlopen(f"{url}/health").status == 200
    with pytest.raises(EngineError, match=rf"401 .* Set the environment variable {KEY}"):
        Server(url, 10, "wrong").label()


def test_an_evaluation_refuses_servers_that_were_trained(started):
    trainer = started.trainer
    with pytest.raises(EngineError, match=r"its weights are /.* with the label \w+:0, not those of model.path=/"):
        create_engine(trainer.config, trainer.processor)


def test_a_run_ahead_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(started, tmp_path):
    """Of steps 0 to 3 it stops after the second one, with the completions of the third in its checkpoint."""
    urls = f"rollout.servers=[{','.join(started.urls)}]"
    ahead = ("rollout.ahead=1", "loss.importance_cap=2", "trainer.steps=4", f"trainer.output_dir={tmp_path}")
    straight = started.new_trainer(urls, *ahead)
    steps = [straight.run_step(), straight.run_step()]
    straight.save()
    steps += [straight.run_step(), straight.run_step()]
    assert [step.metrics["staleness"] for step in steps] == [0, 1, 1, 1]
    assert all(step.metrics["mismatch/sync"] < 1e-3 for step in steps)
    assert [step.metrics["mismatch/logprob"] > 1e-3 for step in steps] == [False, True, True, True]  # an update older
    resumed = started.new_trainer(urls, *ahead, resume="")
    assert resumed.step == 2
    again = [resumed.run_step(), resumed.run_step()]
    completions = [[group.completions for group in step.groups] for step in (again[0], steps[2])]
    assert completions[0] == completions[1] and curve(again[0]) == curve(steps[2])
    assert curve(again[1]) == pytest.approx(curve(steps[3]), rel=1e-4)  # servers round by what they generate together
    started.trainer.sync()


def curve(step):
    """What a step's metrics are of: its completions, and the update."""
    names = ("reward", "loss", "entropy", "tokens", "staleness", "mismatch/logprob")
    return {name: step.metrics[name] for name in names}


def test_a_server_that_dies_while_it_generates_leaves_the_completions_as_they_are(started):
    engine, requests = started.trainer.engine, requests_of(started.trainer, 6)
    expected = engine.generate(requests, 4, SAMPLING)
    assert len(set(map(len, expected))) == 1 and any(c.finished for group in expected for c in group)
    # It holds its requests back, so that it is certain that it dies with some.
    started.servers[1].post("/pause?mode=keep", {})
    found = []
    asking = threading.Thread(target=lambda: found.extend(engine.generate(requests, 4, SAMPLING)))
    with pytest.warns(UserWarning, match=f"a rollout server is out: {started.urls[1]}"):
        asking.start()
        while not engine._busy[started.urls[1]]:
            time.sleep(0.01)
        started.kill(1)
        asking.join()
    assert tokens(found) == tokens(expected)
    flat = [[c.logprobs for c in group] for group in found], [[c.logprobs for c in group] for group in expected]
    assert all(a == pytest.approx(b, abs=1e-5) for x, y in zip(*flat) for a, b in zip(x, y))
    started.restart(1)


def test_a_step_goes_on_with_the_server_that_is_left(started, monkeypatch):
    trainer, asked, label = started.trainer, [], Server.label
    assert [server.url for server in trainer.engine._live] == started.urls[:1]
    monkeypatch.setattr(Server, "label", lambda self: asked.append(self.url) or label(self))
    metrics, _ = trainer.run_step()
    assert trainer.engine.version == trainer.step == 1
    assert asked.count(started.urls[1]) == 2  # once before the rollout, once at the sync: it may take seconds
    assert metrics["mismatch/logprob"] < 1e-3 and metrics["mismatch/sync"] < 1e-3


def test_a_server_that_has_restarted_is_given_the_weights_again(started):
    trainer, server = started.trainer, started.servers[1]
    started.await_restarted(1)
    assert server.label() == "default"
    request = requests_of(trainer, 1)[0]
    alone = load_config(None, [*started.settings, f"rollout.servers=[{server.url}]"])
    for _ in range(2):  # an evaluation leaves a server as it was, for the next one
        ((answer,),) = create_engine(alone, trainer.processor).generate([request], 1, SAMPLING)
        assert answer.token_ids and server.label() == "default"
    assert not trainer.engine.up_to_date()
    trainer.keep_up()
    assert trainer.engine.up_to_date()
    assert server.label().endswith(":1")
    one, other = trainer.engine.everywhere(request, SAMPLING)
    assert one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_weights_that_cannot_be_written_once_are_handed_over_before_the_next_rollout(started, tmp_path):
    trainer, engine = started.trainer, started.trainer.engine
    root, engine._transfer._root = engine._transfer._root, tmp_path / "file" / "below"
    (tmp_path / "file").touch()
    trainer.step += 1
    with pytest.warns(UserWarning, match="a rollout server is out: .*the weights can't be written to"):
        trainer.sync()
    assert engine._live == []
    engine._transfer._root = root
    trainer.keep_up()
    assert len(engine._live) == 2 and all(server.label().endswith(":2") for server in started.servers)
    trainer.step -= 1
    trainer.sync()


def test_a_server_with_other_weights_than_the_run_gave_it_answers_for_nothing(started):
    trainer, server = started.trainer, started.servers[1]
    requests = requests_of(trainer, 4)
    expected = trainer.engine.generate(requests, 2, SAMPLING)
    mine = server.label()
    server.set_label("another run's")
    with pytest.warns(UserWarning, match="its weights are another run's, not the run's"):
        found = trainer.engine.generate(requests, 2, SAMPLING)
    assert tokens(found) == tokens(expected)
    server.set_label(mine)
    assert trainer.engine.up_to_date() and len(trainer.engine._live) == 2


def test_without_any_server_a_step_ends_with_one_sentence_and_the_trainer_as_it_was(started):
    trainer = started.trainer
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    for number in (0, 1):
        started.kill(number)
    with pytest.warns(UserWarning), pytest.raises(EngineError) as error:
        trainer.run_step()
    told = str(error.value)
    assert told.startswith("rollout.engine=server: no server is left: ") and all(url in told for url in started.urls)
    assert trainer.step == 1
    assert all(map(torch.equal, before, trainer.policy.parameters()))


def test_weights_that_cannot_be_written_are_gathered_to_the_end_and_it_is_said_why(config, tmp_path):
    """The other ranks take part in gathering each of them, and would wait for ever for one that has stopped."""
    (tmp_path / "file").touch()
    folder = tmp_path / "weights"
    transfer = WeightFolder(config("rollout.engine=server", f"rollout.weight_folder={folder}"))
    folder.symlink_to(tmp_path / "file")
    weights = iter([(str(number), torch.zeros(2)) for number in range(3)])
    url = "http://127.0.0.1:1"
    failed = transfer.send([Server(url, 1)], weights, "run:1")
    assert failed[url].startswith(f"{url}: the weights can't be written to {folder}: ") and len(failed) == 1
    assert list(weights) == []


def test_weights_that_a_killed_run_has_left_in_memory_are_deleted_and_no_living_ones(config, tmp_path, monkeypatch):
    monkeypatch.setattr("vogue.rollout.server_weights_folder.MEMORY", tmp_path)
    killed, living, new = (tmp_path / f"vogue_weights_{name}" for name in ("killed", "living", "new"))
    for folder in (killed, living, new):
        folder.mkdir()
    for folder in (killed, living):  # the third one's lock isn't there yet
        (folder / ".lock").touch()
    transfer = WeightFolder(config("rollout.engine=server"))
    with open(living / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        transfer.send([Server("http://127.0.0.1:1", 1)], iter([("a", torch.zeros(2))]), "run:1")
    assert sorted(tmp_path.iterdir()) == [living, new]


def test_an_answer_that_does_not_come_is_told_with_the_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServerLost) as error:
        Server(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2).post("/resume", {})
    assert str(error.value).endswith(": no answer in 0.2 s, by trainer.timeout")


def test_an_engine_that_hangs_is_not_waited_for_as_long_as_for_a_rollout(monkeypatch):
    monkeypatch.setattr("vogue.rollout.server_client.BETWEEN_STEPS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServerLost, match=r"no answer in 0.2 s$"):
        Server(f"http://127.0.0.1:{silent.getsockname()[1]}", 600).pause()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["servers=[http://a:1]"], r"rollout.servers=\['http://a:1'\]: only rollout.engine=server reads it, not hf"),
        (["engine=server", "servers=[a:1]"], r"rollout.servers.0='a:1': string should match pattern"),
        (["engine=server", "servers=[http://a:1,http://a:1]"], "one of them stands twice"),
        (["engine=server", "servers=[http://a:1]", "server_count=2"], "rollout.servers names servers that are started"),
        (
            ["engine=server", "server_gpus=[0,1,2]", "server_count=2"],
            "rollout.server_count=2 servers of rollout.tensor_parallel=1 take 2 GPUs",
        ),
        (["engine=server", "weight_folder=x", "weight_transfer=nccl"], "rollout.weight_transfer=nccl writes no files"),
    ],
)
def test_settings_of_servers_that_nothing_reads_are_refused(given, told, config):
    with pytest.raises(ConfigError, match=told):
        config(*(f"rollout.{setting}" for setting in given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("weight_transfer=nccl", "rollout.weight_transfer=nccl: there is no GPU here"),
        ("server_gpus=[0]", r"rollout.server_gpus=\[0\]: there is no GPU here"),
        (
            "servers=[http://10.0.0.7:8000]",
            "rollout.weight_folder is not set: http://10.0.0.7:8000 is on another machine",
        ),
    ],
)
def test_what_servers_would_lack_is_told_before_a_run(given, told, config, settings):
    with pytest.raises(ConfigError, match=told):
        check_servers(config("rollout.engine=server", f"rollout.{given}"))


def test_a_server_that_others_reach_has_a_key(config, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ConfigError, match=f"^--host 0.0.0.0: whoever reaches the server .* variable {KEY}"):
        serve(config(), "0.0.0.0", 8000)
