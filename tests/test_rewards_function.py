"""A reward of the user's own: a real file in a real process, and what its user is told when it fails."""

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vogue.cli import main
from vogue.config.sections import RewardConfig
from vogue.data import Sample
from vogue.rewards import RewardError, Score, check_function, score_batch
from vogue.rewards.function import RewardFunction

SAMPLES = [Sample("<image>How many?", answer, (b"never opened",), category="dots") for answer in ("3", "4", "5")]
TEXTS = ["\\boxed{3}", "good", "\\boxed{5} \ud800"]


class Rewards(RewardFunction):
    """A function of which the rewards alone are looked at."""

    def __call__(self, completions, samples):
        return [earned.reward for earned in super().__call__(completions, samples)]


@pytest.fixture
def function(tmp_path):
    """A function: the reward `own` of a file with this body, with a limit of `seconds` a call."""
    made = []

    def build(body, seconds=30.0, before=""):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "rewards.py").write_text(f"{before}\ndef own(completions, samples):\n{lines}\n")
        made.append(Rewards(f"{tmp_path}/rewards.py:own", seconds))
        return made[-1]

    yield build
    for each in made:
        each.close()


def told(function, texts=TEXTS, samples=SAMPLES):
    """The message of a call that fails, without the function's name, which it must begin with."""
    with pytest.raises(RewardError) as error:
        function(texts, samples)
    start = f"reward.function={function.spec} "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)


def test_a_function_gets_the_whole_batch_and_each_samples_text(function):
    expected = {"problem": "<image>How many?", "answer": "3", "source": "", "category": "dots", "state": ""}
    own = function(
        f"assert samples[0] == {expected}\n"
        "rows = zip(completions, samples, strict=True)\n"
        "return [len(completions) + len(text) + int(sample['answer']) / 10 for text, sample in rows]"
    )
    assert own(TEXTS, SAMPLES) == pytest.approx([3 + 9 + 0.3, 3 + 4 + 0.4, 3 + 11 + 0.5])
    assert own(TEXTS[:1], SAMPLES[:1]) == pytest.approx([1 + 9 + 0.3])
    assert own([], []) == []


def test_the_file_is_imported_once_beside_its_neighbours_and_may_print_and_use_numpy(function, tmp_path, capfd):
    (tmp_path / "neighbour.py").write_text("VALUE = 0.25")
    before = "import os\nimport numpy\nimport neighbour\ncalls = []\nos.system('echo loud')"
    own = function(
        "print('seen')\ncalls.append(1)\nreturn numpy.full(3, neighbour.VALUE + len(calls), 'float32')", 30, before
    )
    assert own(TEXTS, SAMPLES) == [1.25] * 3
    assert own(TEXTS, SAMPLES) == [2.25] * 3
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.split() == ["loud", "seen", "seen"]


def test_all_columns_of_a_row_reach_the_function(function):
    own = function("return [sample['level'] + sample['box'][1] for sample in samples]")
    samples = [Sample("Where?", "there", (), columns={"level": n, "box": [0, n / 4], "answer": "no"}) for n in (1, 2)]
    assert own(["a", "b"], samples) == [1.25, 2.5]


def test_an_exception_is_told_with_its_line_and_the_completion_it_came_from(function):
    own = function("return [float(text.removeprefix('\\\\boxed{').removesuffix('}')) for text in completions]")
    message = told(own)
    assert message == (
        "raised ValueError: could not convert string to float: 'good' (line 3) on completion 2 of 3, answer '4':\ngood"
    )
    assert own(TEXTS[:1], SAMPLES[:1]) == [3.0]  # it lives on


def test_a_long_completion_is_cut_in_a_message(function):
    message = told(function("raise KeyError('text')"), ["x" * 5000], SAMPLES[:1])
    assert message == "raised KeyError: 'text' (line 3) on completion 1 of 1, answer '3':\n" + "x" * 2000 + " …"


def test_a_failure_of_the_batch_alone_is_told_as_such(function):
    message = told(function("if len(completions) > 1:\n    raise MemoryError\nreturn [0.0]"))
    assert message == (
        "raised MemoryError:  (line 4) on 3 completions at once, but on none of the first 3 alone; the first:\n"
        "\\boxed{3}"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *[("float('nan')", "nan"), ("float('-inf')", "-inf"), ("None", "None"), ("'0.5'", "'0.5'"), ("[1.0]", "[1.0]")],
        ("10**400", str(10**400)),
    ],
)
def test_what_is_not_a_finite_number_is_no_reward(function, value, shown):
    own = function(f"return [{value} if text == 'good' else 1 for text in completions]")
    assert told(own) == f"returned {shown}, not a finite number, on completion 2 of 3, answer '4':\ngood"


def test_too_many_rewards_are_refused(function):
    message = told(function("return [1.0] * (len(completions) + 1)"))
    assert message == "returned 2 rewards for 1 completions on completion 1 of 3, answer '3':\n\\boxed{3}"


def test_too_few_rewards_are_refused(function):
    message = told(function("return [1.0] * (len(completions) // 2)"))
    assert message == "returned 0 rewards for 1 completions on completion 1 of 3, answer '3':\n\\boxed{3}"
    message = told(function("return [1.0] * min(2, len(completions))"))
    assert message.startswith(
        "returned 2 rewards for 3 completions on 3 completions at once, but on none of the first 3"
    )
    assert told(function("return None")).startswith(
        "raised TypeError: 'NoneType' object is not iterable on completion 1"
    )


@pytest.mark.parametrize("hang", ["import time; time.sleep(600)", "9 ** 9 ** 9"])
def test_a_completion_that_takes_too_long_is_found_and_told(function, hang):
    own = function(f"if 'good' in completions:\n    {hang}\nreturn [1.0] * len(completions)", seconds=3)
    began = time.monotonic()
    assert told(own) == "took longer than reward.timeout=3 s on completion 2 of 3, answer '4':\ngood"
    assert time.monotonic() - began < 60
    assert own(TEXTS[:1], SAMPLES[:1]) == [1.0]  # in another process


def test_a_function_that_is_slow_on_all_of_them_is_not_blamed_on_one(function):
    own = function("import time\ntime.sleep(1.2 * len(completions))\nreturn [1.0] * len(completions)", seconds=3)
    assert told(own).startswith(
        "took longer than reward.timeout=3 s on 3 completions at once, but on none of the first 3 alone; the first:"
    )


def test_a_function_that_ends_its_process_is_told_with_the_exit_code(function):
    own = function("import os\nif 'good' in completions:\n    os._exit(3)\nreturn [1.0] * len(completions)")
    assert told(own) == "ended its process (exit code 3) on completion 2 of 3, answer '4':\ngood"


def test_what_a_function_starts_reads_none_of_its_questions(function):
    own = function("import subprocess\nsubprocess.run(['cat'])\nreturn [1.0] * len(completions)", seconds=20)
    assert own(TEXTS, SAMPLES) == own(TEXTS, SAMPLES) == [1.0] * 3


def test_a_function_may_terminate_what_it_starts(function):
    own = function(
        "os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does\n"
        "started = subprocess.Popen(['sleep', '1000'])\n"
        "forked = multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,))\n"
        "forked.start()\n"
        "time.sleep(0.5)\n"
        "started.terminate(), forked.terminate(), forked.join()\n"
        "return [started.wait(), forked.exitcode, 0]",
        before="import multiprocessing, os, signal, subprocess, time",
    )
    assert own(TEXTS, SAMPLES) == [-signal.SIGTERM, -signal.SIGTERM, 0]


def test_an_interrupted_call_leaves_no_timer_to_wait_for(function, monkeypatch):
    own = function("return [1.0] * len(completions)", seconds=600)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(own._worker, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own(TEXTS, SAMPLES)
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_what_a_function_started_ends_with_it(function, tmp_path):
    body = f"import subprocess\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))"
    own = function(body + "\nreturn [1.0] * len(completions)")
    own(TEXTS, SAMPLES)
    started = (tmp_path / "pid").read_text()
    running = ["ps", "-o", "stat=", "-p", started]
    assert subprocess.run(running, capture_output=True, text=True).stdout[0] in "SR"
    own.close()
    own.close()
    assert subprocess.run(running, capture_output=True, text=True).stdout[:1] in ("", "Z")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "rewards.py:own: there is no file "),
        ("def other(): pass", "rewards.py:own cannot be imported: AttributeError: module 'reward_function' has no "),
        ("import nonsense_of_this_test", "rewards.py:own cannot be imported: ModuleNotFoundError: No module named "),
        ("1 / 0", "rewards.py:own cannot be imported: ZeroDivisionError: division by zero (line 1)"),
        ("def own(", "rewards.py:own cannot be imported: SyntaxError: '(' was never closed (rewards.py, line 1)"),
        ("raise SystemExit(7)", "rewards.py:own cannot be imported: exit code 7"),
    ],
)
def test_a_function_that_cannot_be_imported_is_told_before_anything_runs(tmp_path, text, told):
    if text is not None:
        (tmp_path / "rewards.py").write_text(text)
    with pytest.raises(RewardError) as error:
        check_function(RewardConfig(function=f"{tmp_path}/rewards.py:own"))
    assert told in str(error.value)
    check_function(RewardConfig())  # nothing to import


def test_the_function_takes_the_place_of_the_designs_sum_and_of_nothing_else(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def own(completions, samples):\n    return [-len(text) for text in completions]"
    )
    settings = RewardConfig(design="vanilla", function=f"{tmp_path}/rewards.py:own")
    scores = score_batch(["<think></think><answer>3</answer>", "4"], SAMPLES[:2], settings)
    assert scores == [
        Score(-33.0, 1.0, 1.0, "3", {"think": 0.0, "answer": 1.0}),
        Score(-1.0, 0.0, 0.0, None, {"think": 0.0, "answer": 0.0}),
    ]


def test_a_run_ends_with_the_message_and_no_traceback(settings, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text("def own(completions, samples):\n    return [completions[0].nonsense]")
    assert (
        main(["eval", *settings, f"reward.function={tmp_path}/rewards.py:own", "data.test_limit=1", "--samples", "1"])
        == 2
    )
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "vogue eval: reward.function=" in printed.err
    assert (
        "raised AttributeError: 'str' object has no attribute 'nonsense' (line 2) on completion 1 of 1" in printed.err
    )
    assert main(["train", *settings, f"reward.function={tmp_path}/nowhere.py:own"]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("hang", ["import time; time.sleep(600)", "9 ** 9 ** 9 ** 9"])
def test_a_file_that_hangs_at_import_is_bounded_and_told(tmp_path, hang):
    (tmp_path / "rewards.py").write_text(hang)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"own cannot be imported: it took longer than reward\.timeout=2 s"):
        RewardFunction(f"{tmp_path}/rewards.py:own", 2)
    assert time.monotonic() - began < 30


KILLED = """
import os, sys, threading
from vogue.rewards.function import RewardFunction
spec, how = sys.argv[1:]
own = RewardFunction(spec, 600)
threading.Timer(1, lambda: os.kill(os.getpid(), 9)).start()
own(["hang in " + how], [type("Sample", (), dict.fromkeys(("problem", "answer", "source", "category", "state"), ""))])
"""


@pytest.mark.parametrize("how", ["Python", "C"])
def test_a_worker_that_hangs_dies_with_a_trainer_that_is_killed(tmp_path, how):
    (tmp_path / "rewards.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "def own(completions, samples):\n"
        "    return 9 ** 9 ** 9 ** 9 if completions == ['hang in C'] else time.sleep(600)\n"
    )
    script = [sys.executable, "-c", KILLED, f"{tmp_path}/rewards.py:own", how]
    assert subprocess.run(script, check=False).returncode == -9
    pid = (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 10
    while (
        state := subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout[:1]
    ) not in ("", "Z"):
        assert time.monotonic() < deadline, state
        time.sleep(0.1)


def test_a_worker_outlives_the_thread_that_started_it(tmp_path):
    (tmp_path / "rewards.py").write_text("def own(completions, samples):\n    return [1.0] * len(completions)\n")
    made = []
    thread = threading.Thread(target=lambda: made.append(Rewards(f"{tmp_path}/rewards.py:own", 30)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert made[0](TEXTS, SAMPLES) == [1.0] * 3
    made[0].close()


SECRETS = (
    *("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GITHUB_PAT", "CLIENT_SECRET", "DB_PASSWORD"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "SSH_AUTH_SOCK", "API_KEY", "Token", "MLFLOW_TRACKING_PASSWORD"),
)
HARMLESS = ("TOKENIZERS_PARALLELISM", "KEYBOARD", "HF_HOME", "MONKEY", "TOKENS_A_STEP")


def test_a_function_gets_no_secret_of_the_trainers_but_those_that_it_is_handed(tmp_path, monkeypatch):
    for name in (*SECRETS, *HARMLESS):
        monkeypatch.setenv(name, "1")
    (tmp_path / "rewards.py").write_text(
        "import os, subprocess\nENV = subprocess.run(['env'], capture_output=True, text=True).stdout\n"
        "NAMES = [line.partition('=')[0] for line in ENV.splitlines()]\n"
        "def own(completions, samples):\n"
        "    return [{'reward': 1, 'parsed': ' '.join(NAMES) + ' ' + os.environ['HF_HOME']}] * len(completions)\n"
    )
    own = RewardFunction(f"{tmp_path}/rewards.py:own", 30, passed=("DB_PASSWORD",))
    names = own(TEXTS[:1], SAMPLES[:1])[0].judged["parsed"].split()
    own.close()
    assert {*HARMLESS, "PATH"} <= set(names)
    assert {*SECRETS} & set(names) == {"DB_PASSWORD"}
    assert names[-1] == "1"


def test_a_function_that_lacks_a_secret_is_told_how_it_gets_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    (tmp_path / "at_import.py").write_text("import os\nKEY = os.environ['OPENAI_API_KEY']\ndef own(c, s): ...\n")
    (tmp_path / "in_a_call.py").write_text("import os\ndef own(c, s): os.environ['OPENAI_API_KEY']\n")
    hint = r"OPENAI_API_KEY is withheld from it: reward\.pass_env=\[\"OPENAI_API_KEY\"\]"
    with pytest.raises(RewardError, match=rf"cannot be imported: KeyError.*; {hint}"):
        RewardFunction(f"{tmp_path}/at_import.py:own", 30)
    own = RewardFunction(f"{tmp_path}/in_a_call.py:own", 30)
    with pytest.raises(RewardError, match=hint):
        own(TEXTS, SAMPLES)
    own.close()
    with pytest.raises(RewardError, match=r"reward\.pass_env: there is no environment variable NOT_SET"):
        check_function(RewardConfig(function=f"{tmp_path}/in_a_call.py:own", pass_env=["NOT_SET"]))


def test_a_judge_in_the_box_has_the_key_of_its_endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the key")
    asked = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            reply = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m"}
        judge = RewardFunction("vogue.rewards.library:judge", 30, options)
        assert [earned.reward for earned in judge(TEXTS[:1], SAMPLES[:1])] == [1.0]
        judge.close()
        server.shutdown()
    assert asked == ["Bearer the key"]
